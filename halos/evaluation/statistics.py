"""Confidence intervals and tests: bootstrap over prompts, sign flips for paired differences, Student's t over seeds.

Completions of the same prompt are correlated. The unit of resampling is therefore a prompt with all its completions,
never a single completion.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Indices = NDArray[np.intp]
LEVEL = 0.95
"""Confidence level of intervals."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its confidence interval.

    Attributes:
        value: the point estimate; NaN where it is not defined.
        low: the lower end of the interval; None if there is no interval.
        high: the upper end of the interval; None if there is no interval.
        n: the number of independent units (prompts or seeds) that it was estimated from.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        """Half of the width of a symmetric interval, such as Student's."""
        return None if self.high is None else self.high - self.value

    def as_json(self) -> dict[str, float | None]:
        """The four fields by name; numbers that are not finite become None."""
        return {name: x if x is not None and math.isfinite(x) else None for name, x in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """Percentile bootstrap over groups of observations (Efron 1979).

    The ``groups`` of each method hold one number per observation; observations of the same prompt have the same
    number, and whole groups are drawn with replacement.

    Attributes:
        resamples: the number of draws.
        level: the confidence level of the intervals.
        seed: the seed of the draws; the same seed gives the same interval.
    """

    resamples: int = 1000
    level: float = LEVEL
    seed: int = 0

    def interval(self, statistic: Callable[[Indices], float], groups: Sequence[int]) -> Estimate:
        """Estimate a statistic with its interval.

        Args:
            statistic: maps the indices of observations to a number, or to NaN where it is not defined.
            groups: the group of each observation.

        Returns:
            The statistic of all observations. It has no interval if there are fewer than two groups, or if more than
            half of the draws leave the statistic undefined; fewer undefined draws are left out.
        """
        members = _members(groups)
        value = statistic(np.arange(len(groups)))
        if len(members) < 2:
            return Estimate(value, None, None, len(members))
        random = np.random.default_rng(self.seed)
        singletons = len(members) == len(groups)  # group numbers are then indices, and need no concatenation
        draws = []
        for _ in range(self.resamples):
            drawn = random.integers(len(members), size=len(members))
            draws.append(statistic(drawn if singletons else np.concatenate([members[i] for i in drawn])))
        # A draw may leave the statistic undefined, such as the AUC of labels of one class.
        defined = [x for x in draws if math.isfinite(x)]
        if 2 * len(defined) < self.resamples:
            return Estimate(value, None, None, len(members))
        low, high = np.quantile(defined, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Estimate(value, float(low), float(high), len(members))

    def mean(self, values: ArrayLike, groups: Sequence[int]) -> Estimate:
        """Estimate the mean of ``values`` [n]."""
        array = np.asarray(values, dtype=float)
        return self.interval(lambda i: float(array[i].mean()), groups)

    def ratio(self, totals: ArrayLike, counts: ArrayLike, groups: Sequence[int]) -> Estimate:
        """Estimate Σ totals / Σ counts, such as a mean per token of completions whose lengths differ (both [n])."""
        above, below = np.asarray(totals, dtype=float), np.asarray(counts, dtype=float)
        return self.interval(lambda i: float(above[i].sum() / below[i].sum()), groups)

    def rate(self, values: ArrayLike, groups: Sequence[int]) -> Estimate:
        """Estimate the mean of ``values`` [n] that lie in [0, 1].

        Where all values are 0, or all are 1, every draw of the bootstrap is the same and its interval would have no
        width. The exact interval of Clopper and Pearson (1934) is used there.
        """
        array = np.asarray(values, dtype=float)
        estimate = self.mean(array, groups)
        if not len(array) or array.min() != array.max() or array[0] not in (0, 1):
            return estimate
        # Of n groups, not of all values: completions of one prompt are not independent trials.
        successes = estimate.n if array[0] == 1 else 0
        from scipy.stats import binomtest  # slow to import

        exact = binomtest(successes, estimate.n).proportion_ci(self.level, method="exact")
        return Estimate(estimate.value, float(exact.low), float(exact.high), estimate.n)

    def correlation(self, x: ArrayLike, y: ArrayLike, groups: Sequence[int]) -> Estimate:
        """Estimate Pearson's correlation of ``x`` and ``y`` (both [n]); NaN where one of them is constant."""
        a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)

        # Not np.corrcoef or scipy's pearsonr: both warn for each of the draws in which one side is constant.
        def pearson(i: Indices) -> float:
            u, v = a[i] - a[i].mean(), b[i] - b[i].mean()
            scale = math.sqrt(float(u @ u) * float(v @ v))
            return float(u @ v) / scale if scale > 0 else math.nan

        return self.interval(pearson, groups)


def sign_flip_p(differences: ArrayLike, *, flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of Fisher's sign-flip test (1935) that paired differences have mean 0.

    Args:
        differences: one difference for each independent unit, [n].
        flips: the number of sign patterns. If all 2^n patterns are no more than this, the test is exact; otherwise
            that many random patterns are drawn, and the p-value is never below 1 / (flips + 1).
        seed: the seed of random patterns.
    """
    d = np.asarray(differences, dtype=float)
    if len(d) < 2 or not d.any():  # every sign pattern gives the observed sum
        return 1.0
    # The absolute sum with the alternative "greater" is the two-sided test. scipy's own two-sided alternative doubles
    # the smaller one-sided p-value, and would count the added 1 of random patterns twice.
    from scipy.stats import permutation_test  # slow to import

    test = permutation_test(
        (d,),
        lambda signed, axis: np.abs(signed.sum(axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=flips,
        batch=500,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def over_seeds(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean over runs that differ only in their seed, with Student's t interval; none for a single run."""
    centre = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(centre, None, None, len(values))
    quantile = float(special.stdtrit(len(values) - 1, (1 + level) / 2))
    half_width = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(centre, centre - half_width, centre + half_width, len(values))


def _members(groups: Sequence[int]) -> list[Indices]:
    # Indices of the observations of each group, groups in order of first appearance.
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return [np.asarray(indices) for indices in members.values()]
