"""Intervals and tests: bootstrap over prompts, sign flips for paired comparisons, Student's t over seeds.

Completions of one prompt are alike, so what is drawn again is a prompt with all that belongs to it, never a completion
alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.intp]
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its confidence interval (None where there is none), from ``n`` independent units."""

    value: float
    low: float | None
    high: float | None
    n: int

    def as_json(self) -> dict[str, Any]:
        """Plain fields; what is not finite becomes null."""
        value, low, high = (
            x if x is not None and math.isfinite(x) else None for x in (self.value, self.low, self.high)
        )
        return {"value": value, "low": low, "high": high, "n": self.n}


def bootstrap(
    statistic: Callable[[Indices], float],
    groups: Sequence[int],
    *,
    resamples: int = 1000,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Percentile interval of a statistic of the observations whose indices it is given (Efron 1979).

    ``groups`` says which observations belong together (to one prompt); groups are drawn with replacement. Draws for
    which the statistic is not defined (NaN) are left out; if more than half are, there is no interval.
    """
    members = _members(groups)
    value = statistic(np.arange(len(groups)))
    if len(members) < 2:
        return Estimate(value, None, None, len(members))
    random = np.random.default_rng(seed)
    single = len(members) == len(groups)
    found = []
    for _ in range(resamples):
        drawn = random.integers(len(members), size=len(members))
        found.append(statistic(drawn if single else np.concatenate([members[i] for i in drawn])))
    defined = [x for x in found if math.isfinite(x)]
    if 2 * len(defined) < resamples:
        return Estimate(value, None, None, len(members))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), len(members))


def mean(values: Sequence[float], groups: Sequence[int] | None = None, **options: Any) -> Estimate:
    """The mean of ``values`` with its bootstrap interval."""
    array = np.asarray(values, dtype=float)
    return bootstrap(lambda i: float(array[i].mean()), range(len(array)) if groups is None else groups, **options)


def ratio(totals: Sequence[float], counts: Sequence[float], groups: Sequence[int], **options: Any) -> Estimate:
    """Σ totals / Σ counts with its bootstrap interval: a mean per token, of completions of uneven length."""
    above, below = np.asarray(totals, dtype=float), np.asarray(counts, dtype=float)
    return bootstrap(lambda i: float(above[i].sum() / below[i].sum()), groups, **options)


def rate(
    values: Sequence[float], groups: Sequence[int] | None = None, *, level: float = LEVEL, **options: Any
) -> Estimate:
    """The mean of values in [0, 1]. Where all are 0 or all are 1 the bootstrap would claim certainty; there the exact
    bound of Clopper and Pearson (1934) takes its place."""
    found = mean(values, groups, level=level, **options)
    if len(values) and min(values) == max(values) and values[0] in (0, 1):
        reach = 1 - ((1 - level) / 2) ** (1 / found.n)
        low, high = (0.0, reach) if values[0] == 0 else (1 - reach, 1.0)
        return Estimate(found.value, low, high, found.n)
    return found


def correlation(x: Sequence[float], y: Sequence[float], groups: Sequence[int], **options: Any) -> Estimate:
    """Pearson's correlation with its bootstrap interval; NaN where one of the two does not vary."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)

    def pearson(i: Indices) -> float:
        u, v = a[i] - a[i].mean(), b[i] - b[i].mean()
        scale = math.sqrt(float(u @ u) * float(v @ v))
        return float(u @ v) / scale if scale > 0 else math.nan

    return bootstrap(pearson, groups, **options)


def sign_flip_p(differences: Sequence[float], *, flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the paired differences having mean 0 under Fisher's sign-flip test (1935).

    Exact where all 2^n sign patterns are no more than ``flips``, else over so many random ones (never below
    1 / (flips + 1)).
    """
    d = np.asarray(differences, dtype=float)
    if not len(d) or not d.any():
        return 1.0
    observed = abs(float(d.sum())) * (1 - 1e-12)
    if 2 ** len(d) <= flips:
        patterns = (np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1
        return float((np.abs((2 * patterns - 1) @ d) >= observed).mean())
    random = np.random.default_rng(seed)
    reached = 0
    for start in range(0, flips, 500):
        count = min(500, flips - start)
        signs = random.integers(0, 2, size=(count, len(d)), dtype=np.int8) * 2.0 - 1
        reached += int((np.abs(signs @ d) >= observed).sum())
    return (reached + 1) / (flips + 1)


def over_seeds(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """The mean over runs that differ in their seed, with Student's t interval."""
    centre = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(centre, None, None, len(values))
    reach = t_quantile((1 + level) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(centre, centre - reach, centre + reach, len(values))


def t_quantile(p: float, freedom: int) -> float:
    """The quantile of Student's t with ``freedom`` degrees, for p > 0.5, by bisection."""
    low, high = 0.0, 1.0
    while _t_cdf(high, freedom) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, freedom) < p else (low, middle)
    return high


def _t_cdf(t: float, freedom: int) -> float:
    # Abramowitz and Stegun 26.7.3 and 26.7.4: a finite series for whole degrees of freedom.
    angle = math.atan(t / math.sqrt(freedom))
    cosine2 = math.cos(angle) ** 2
    odd = freedom % 2
    term = total = (math.cos(angle) if freedom > 1 else 0.0) if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine2
        total += term
    area = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + area) / 2


def _members(groups: Sequence[int]) -> list[Indices]:
    found: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault(group, []).append(index)
    return [np.asarray(indices) for indices in found.values()]
