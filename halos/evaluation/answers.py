"""The likelihood of people's answers, given scores of the replies and a value function.

The person is the toy world's :class:`halos.toy.people.Annotator`. A reply with score x (a log-ratio, or that of a
reward model) and length n, less the mean length, is a gain of g = x + b n − e. Its value v is g^α for a gain and
−λ |g|^α for a loss. A label is desirable with probability σ(v/s). Of two replies the first is preferred with
probability σ((v₁ − v₂)/s).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]
NAMES = ("expectation", "curvature", "loss_aversion", "noise", "length_bias")
"""The parameters e, α, λ, s and b, by the names that the toy world's annotator has for them."""
POSITIVE = ("curvature", "loss_aversion", "noise")
"""Parameters that are above 0. The search is over their logarithms."""
CURVATURES, LOSS_AVERSIONS = (0.1, 4.0), (0.01, 100.0)
"""The ranges of α and λ that are searched."""
NOISES = 8.0
"""How far log s is searched on both sides of the logarithm of the scores' standard deviation."""
NEAREST = 1e-6
"""The gain, in standard deviations of the scores, below which slopes are those at this gain: at 0 they are infinite."""


@dataclass(frozen=True)
class Answers:
    """What people answered, with the scores of the replies.

    Attributes:
        scores: x of each reply, [replies].
        lengths: of each reply, [replies].
        labelled: index of the reply of each label, [labels].
        desirable: each label, [labels].
        pairs: indices of the better and the worse reply of each pair, [pairs, 2].

    Raises:
        ValueError: no parameter could be estimated from them.
    """

    scores: Array
    lengths: Array
    labelled: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    desirable: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    pairs: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))

    def __post_init__(self) -> None:
        if not self.count:
            raise ValueError("data: expected labels or pairs, found none")
        scores = self.scores[self.judged]
        if wrong := int((~np.isfinite(scores)).sum()):
            raise ValueError(f"scores: expected a finite score of each judged reply, found {wrong} others")
        if np.ptp(scores) == 0:
            found = f"found {scores[0]:g} for all {len(scores)}"
            raise ValueError(f"scores: expected scores that differ, {found}; set a policy that is not its reference")
        if not len(self.pairs) and self.desirable.all() != self.desirable.any():
            return
        if not len(self.pairs):
            kind = "desirable" if self.desirable.all() else "undesirable"
            raise ValueError(
                f"data: expected desirable and undesirable replies, found {len(self.desirable)}, all of them {kind}; "
                "without the other kind the likelihood has no maximum"
            )

    @property
    def count(self) -> int:
        """The number of labels and pairs."""
        return len(self.labelled) + len(self.pairs)

    @property
    def judged(self) -> NDArray[np.int64]:
        """The indices of the replies that have an answer, each once."""
        return np.unique(np.concatenate([self.labelled, self.pairs.ravel()]))


class _Values(NamedTuple):
    # Gains g, the logarithm of their size, values v(g) and slopes v'(g), each [replies].
    gains: Array
    logs: Array
    values: Array
    slopes: Array


class Likelihood:
    """The negative log-likelihood of answers and its gradient, at a point of the search.

    A point [5] holds the parameters in the order of :data:`NAMES`, in units in which steps are of similar size: e in
    standard deviations of the scores, logarithms of α, λ and s, and b in standard deviations of score per length.

    Args:
        answers: the answers.
    """

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        judged = answers.judged
        self.scores = answers.scores[judged]
        self.lengths = answers.lengths - answers.lengths[judged].mean()
        self.deviation = float(self.scores.std())
        spread = float(self.lengths[judged].std())
        self.units = {"expectation": self.deviation, "length_bias": self.deviation / spread if spread else 1.0}
        # An answer compares the value of a first reply with that of a second, or of a label with 0.
        self.first = np.concatenate([answers.labelled, answers.pairs[:, 0]])
        self.signs = np.concatenate([np.where(answers.desirable, 1.0, -1.0), np.ones(len(answers.pairs))])

    def point(self, name: str, number: float) -> float:
        """Return a parameter as it stands in a point."""
        return math.log(number) if name in POSITIVE else number / self.units[name]

    def parameter(self, name: str, coordinate: float) -> float:
        """Return the parameter that stands in a point as ``coordinate``."""
        return math.exp(coordinate) if name in POSITIVE else coordinate * self.units[name]

    def parameters(self, point: Array) -> dict[str, float]:
        """Return the parameters of a point by their names."""
        return {name: self.parameter(name, float(point[place])) for place, name in enumerate(NAMES)}

    def bounds(self, fixed: Mapping[str, float]) -> Array:
        """Return the lowest and the highest coordinate of each parameter, [5, 2].

        Args:
            fixed: coordinates of parameters that do not vary.
        """
        scores, noise = self.scores / self.deviation, math.log(self.deviation)
        beyond = float(np.ptp(scores)) / 2
        logs = (tuple(map(math.log, limits)) for limits in (CURVATURES, LOSS_AVERSIONS))
        outer = (float(scores.min()) - beyond, float(scores.max()) + beyond)
        searched = dict(zip(NAMES, (outer, *logs, (noise - NOISES, noise + NOISES), (-10.0, 10.0)), strict=True))
        return np.array([(fixed[name],) * 2 if name in fixed else searched[name] for name in NAMES])

    def __call__(self, point: Array) -> tuple[float, Array]:
        """Return the negative log-likelihood and its gradient, [5]."""
        _, curvature, _, noise, _ = self.parameters(point).values()
        at = self._values(point)
        odds = self._odds(at.values, noise)
        # The derivatives by the differences of values, by values and by gains.
        by_difference = -special.expit(-odds) * self.signs / noise
        by_value = np.bincount(self.first, by_difference, len(at.values))
        of_pairs = by_difference[len(self.answers.labelled) :]
        by_value -= np.bincount(self.answers.pairs[:, 1], of_pairs, len(at.values))
        by_gain = by_value * at.slopes
        gradient = (
            -by_gain.sum() * self.units["expectation"],
            (by_value * at.values * at.logs).sum() * curvature,
            (by_value * at.values)[at.gains < 0].sum(),
            (special.expit(-odds) * odds).sum(),
            (by_gain * self.lengths).sum() * self.units["length_bias"],
        )
        return float(np.logaddexp(0, -odds).sum()), np.array(gradient)

    def share_wrong(self, point: Array) -> float:
        """Return the mean probability of the answer that the value alone, without noise, would not give."""
        odds = self._odds(self._values(point).values, self.parameters(point)["noise"])
        return float(special.expit(-np.abs(odds)).mean())

    def _values(self, point: Array) -> _Values:
        expectation, curvature, aversion, _, length_bias = self.parameters(point).values()
        gains = self.answers.scores + length_bias * self.lengths - expectation
        logs = np.log(np.maximum(np.abs(gains), NEAREST * self.deviation))
        sizes = np.exp(curvature * logs) * np.where(gains >= 0, 1.0, aversion)
        return _Values(gains, logs, np.where(gains >= 0, sizes, -sizes), curvature * sizes * np.exp(-logs))

    def _odds(self, values: Array, noise: float) -> Array:
        # The log-odds of each answer, [labels + pairs].
        differences = values[self.first]
        differences[len(self.answers.labelled) :] -= values[self.answers.pairs[:, 1]]
        return np.asarray(self.signs * differences / noise)
