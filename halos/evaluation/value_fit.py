"""Fits the parameters of people's value function to their answers, with profile likelihood intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from halos.checks import check_choice, is_number
from halos.evaluation.answers import NAMES, POSITIVE, Answers, Array, Likelihood
from halos.evaluation.statistics import LEVEL, Estimate

LINEAR = {"curvature": 1.0, "loss_aversion": 1.0}
"""The parameters of a value function that is a straight line."""
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Quantiles of the scores, at which a search starts for the expectation."""
AVERSIONS = (1 / 3, 1.0, 3.0)
"""The λ at which a search starts. Pairs often have one maximum on either side of 1."""
DROP = float(stats.chi2.ppf(LEVEL, df=1)) / 2
"""How far the profile log-likelihood falls from its maximum to the ends of an interval."""
TOLERANCE, WIDTH = 1e-3, 0.005
"""Differences of log-likelihoods and of coordinates that count as zero."""


@dataclass(frozen=True)
class ValueFit:
    """The parameters that make the answers most likely.

    Attributes:
        estimates: each estimated parameter with its interval. An end is None if the answers give no bound: the
            likelihood has not dropped enough at the end of the searched range.
        fixed: the values of the other parameters.
        log_likelihood: the log-likelihood of the answers.
        linear: the highest log-likelihood of a linear value, α = λ = 1; None if α or λ is fixed.
        share_wrong: the mean probability that an answer differs from the one that the value without noise would give.
    """

    estimates: dict[str, Estimate]
    fixed: dict[str, float]
    log_likelihood: float
    linear: float | None
    share_wrong: float

    @property
    def p_linear(self) -> float | None:
        """The p-value of the likelihood ratio test of a linear value function (χ², two degrees of freedom)."""
        if self.linear is None:
            return None
        return float(stats.chi2.sf(2 * max(0.0, self.log_likelihood - self.linear), df=len(LINEAR)))

    def is_determined(self, name: str) -> bool:
        """Whether a parameter has an interval with two ends."""
        estimate = self.estimates.get(name)
        return estimate is not None and estimate.low is not None and estimate.high is not None


def fit_value(answers: Answers, fixed: Mapping[str, float] | None = None) -> ValueFit:
    """Estimate the parameters of the value function by maximum likelihood.

    An interval holds the values of a parameter for which the likelihood, at its highest over the other parameters, is
    within half of the 95 % quantile of χ² (one degree of freedom) of the maximum. Answers count as independent.

    Args:
        answers: labels, pairs or both.
        fixed: values of parameters that are not estimated. If all replies have the same length, ``length_bias`` is 0.

    Raises:
        ValueError: there is no such parameter, its value is out of range, or none is left to estimate.
    """
    fixed = check_fixed(fixed or {})
    if np.ptp(answers.lengths[answers.judged]) == 0:
        fixed = {"length_bias": 0.0, **fixed}
    free = [name for name in NAMES if name not in fixed]
    if not free:
        raise ValueError("fix: expected a parameter to estimate, found values for all of them")
    likelihood = Likelihood(answers)
    search = _Search(likelihood, fixed)
    intervals, before = dict[str, tuple[float | None, float | None]](), math.inf
    while search.best.fun < before - TOLERANCE:  # again if the first search had missed the maximum
        before = search.best.fun
        intervals = {name: search.interval(name) for name in free}
    best = likelihood.parameters(search.best.x)
    estimates = {name: Estimate(best[name], *intervals[name], answers.count) for name in free}
    linear = None if LINEAR.keys() & fixed.keys() else -_Search(likelihood, fixed | LINEAR).best.fun
    return ValueFit(estimates, fixed, -search.best.fun, linear, likelihood.share_wrong(search.best.x))


def check_fixed(fixed: Mapping[str, float]) -> dict[str, float]:
    """Return values of parameters as numbers; raise ``ValueError`` for one that does not exist or is out of range."""
    for name, number in fixed.items():
        check_choice("fix", name, NAMES)
        positive = name in POSITIVE
        if not is_number(number) or not math.isfinite(number) or (positive and number <= 0):
            raise ValueError(f"fix.{name}: expected a number{' above 0' * positive}, found {number!r}")
    return {name: float(number) for name, number in fixed.items()}


class _Search:
    """Searches for the highest likelihood, overall and for given values of one parameter.

    Args:
        likelihood: the negative log-likelihood.
        fixed: values of parameters that do not vary.
    """

    def __init__(self, likelihood: Likelihood, fixed: Mapping[str, float]) -> None:
        self.likelihood = likelihood
        self.fixed = {name: likelihood.point(name, number) for name, number in fixed.items()}
        self.maxima: list[optimize.OptimizeResult] = []
        noise = math.log(likelihood.deviation)
        for score in np.quantile(likelihood.scores / likelihood.deviation, QUANTILES):
            for aversion in AVERSIONS:
                self._add(self._run([np.array([score, 0.0, math.log(aversion), noise, 0.0])], {}))

    @property
    def best(self) -> optimize.OptimizeResult:
        return self.maxima[0]

    def interval(self, name: str) -> tuple[float | None, float | None]:
        """Return the ends of a parameter's interval."""
        bounds = self.likelihood.bounds(self.fixed)[NAMES.index(name)]
        low, high = (self._end(name, float(bound)) for bound in bounds)
        in_units = self.likelihood.parameter
        return (None if low is None else in_units(name, low)), (None if high is None else in_units(name, high))

    def _add(self, optimum: optimize.OptimizeResult) -> None:
        # Up to three different maxima within reach of the highest: later searches start at each of them.
        others = [one for one in self.maxima if np.abs(one.x - optimum.x).max() > 10 * WIDTH]
        ordered = sorted([*others, optimum], key=lambda one: one.fun)
        self.maxima = [one for one in ordered if one.fun < ordered[0].fun + 2 * DROP][:3]

    def _run(self, starts: Sequence[Array], also: Mapping[str, float]) -> optimize.OptimizeResult:
        bounds = self.likelihood.bounds({**self.fixed, **also})
        options = {"jac": True, "method": "L-BFGS-B", "bounds": bounds}
        runs = [optimize.minimize(self.likelihood, np.clip(start, *bounds.T), **options) for start in starts]
        return min(runs, key=lambda run: run.fun)

    def _end(self, name: str, bound: float) -> float | None:
        """Return where the profile falls by :data:`DROP`, on the side of one bound; None if it does not."""
        near, step, last = float(self.best.x[NAMES.index(name)]), 0.05, self.best.x
        while near != bound:
            far = near + math.copysign(min(step, abs(bound - near)), bound - near)
            fallen, last = self._fall(name, far, last)
            if fallen > DROP:
                return self._between(name, near, far, last)
            near, step = far, 2 * step
        return None

    def _between(self, name: str, near: float, far: float, last: Array) -> float:
        while abs(far - near) > WIDTH:
            middle = (near + far) / 2
            fallen, last = self._fall(name, middle, last)
            near, far = (near, middle) if fallen > DROP else (middle, far)
        return (near + far) / 2

    def _fall(self, name: str, coordinate: float, last: Array) -> tuple[float, Array]:
        optimum = self._run([last, *(one.x for one in self.maxima)], {name: coordinate})
        if optimum.fun < self.best.fun - TOLERANCE:
            self._add(self._run([optimum.x], {}))
        return optimum.fun - self.best.fun, optimum.x
