"""The shape of a loss: how its value function bends, whether it is loss-averse, and how steep it can get."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from halos.testing.examples import Make
from halos.theory.definition import ignores_others, moves_with_others
from halos.theory.values import REFERENCE, ImpliedLoss, Side

GAINS = tuple(np.geomspace(0.01, 60.0, 49).tolist())
"""Gains at which curvature and loss aversion are read, in nats; the losses are their negatives."""
DECADE = 6
SIZES = tuple(np.geomspace(1e-6, 1e4, 10 * DECADE + 1).tolist())
"""Sizes of log-ratios, or of log-probs without a reference, over which bounds of the gradient are sought, in nats."""
GROWTH = 1.5
"""A slope that grows by this factor over the last tenfold of the sizes has no bound."""
LARGEST = 1e6
"""A larger slope is that of an exponential, which only keeps itself from overflowing."""
RELATIVE, ABSOLUTE = 1e-9, 1e-12
"""Slopes that differ by less are equal: relative to their size, and to the slope at the reference point."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How the value of a completion depends on its gain, for a desirable one r − z, for an undesirable one z − r.

    Attributes:
        gains: ``concave``, ``convex``, ``linear`` or ``flat`` in gains; several words in the order of their size.
        losses: the same for losses, from the reference point outwards.
        aversion: ``averse`` if a loss weighs at least as much as a gain of the same size, for every size, ``seeking``
            if no more, ``neutral`` if equally much, and else ``mixed``. By slopes, v'(−u) against v'(u).
    """

    gains: str
    losses: str
    aversion: str


def shape(make: Make, side: Side, *, terms: Collection[str] | None = None) -> Shape:
    """Read the shape of a value function off its exact slopes at gains and losses from 0.01 to 60 nats.

    The completions that it is compared with are where the policy equals the reference.

    Args:
        make: an objective's class, or a ``functools.partial`` of it with parameters.
        side: whether the completion is desirable.
        terms: names of the terms of the loss to include; all of them if None.
    """
    loss = ImpliedLoss(make, side, terms)
    # A log-prob without a reference is below 0, which ends its gains.
    room = math.inf if loss.objective.needs.reference else -REFERENCE
    sign = 1.0 if side is Side.DESIRABLE else -1.0

    def slope(gain: float) -> float:
        return -sign * loss.slopes(sign * gain)[0]

    scale = abs(slope(GAINS[0]))
    sizes = [size for size in GAINS if size < room]
    gains, losses = [slope(size) for size in sizes], [slope(-size) for size in GAINS]
    steeper = {_order(gain, loss, scale) for gain, loss in zip(gains, losses, strict=False)} - {0}
    words = {(): "neutral", (1,): "averse", (-1,): "seeking"}
    aversion = words.get(tuple(steeper), "mixed")
    # Concave is a slope that falls from losses to gains, so it rises from the reference point into the losses.
    return Shape(_bends(gains, scale), _bends([-slope for slope in losses], scale), aversion)


def _order(one: float, other: float, scale: float) -> int:
    # The sign of other − one, 0 where they are equal up to rounding.
    if not abs(other - one) > RELATIVE * (abs(one) + abs(other)) + ABSOLUTE * scale:
        return 0
    return 1 if other > one else -1


def _bends(slopes: Sequence[float], scale: float) -> str:
    finite = [slope for slope in slopes if math.isfinite(slope)]
    turns = [turn for turn, _ in groupby(_order(*pair, scale) for pair in pairwise(finite)) if turn]
    if turns:
        return ", then ".join("convex" if turn > 0 else "concave" for turn, _ in groupby(turns))
    return "linear" if any(abs(slope) > ABSOLUTE * scale for slope in finite) else "flat"


def gradient_bounds(make: Make, side: Side, *, terms: Collection[str] | None = None) -> tuple[float, float]:
    """Return bounds of |∂loss/∂r|, for the completion and for the rejected one of a pair (else 0); ∞ without a bound.

    They are the largest slopes over log-ratios r of up to 10,000 nats in both directions, with reference points and
    weights held fixed. Without a reference, the policy's log-probs take the place of r and stay below 0.

    Args:
        make: an objective's class, or a ``functools.partial`` of it with parameters.
        side: whether the completion is desirable.
        terms: names of the terms of the loss to include; all of them if None.
    """
    loss = ImpliedLoss(make, side, terms)
    ratios, others = _log_ratios(loss, SIZES), [0.0]
    # One log-ratio at a time is enough where it is the difference that counts and any difference can be had.
    separable = loss.objective.needs.reference and (moves_with_others(loss) or ignores_others(loss))
    if loss.objective.view == "pairs" and not separable:
        ratios, others = _log_ratios(loss, SIZES[::3]), _log_ratios(loss, SIZES[::DECADE])
    completion_bound = _bound(lambda r, other: loss.slopes(r, other)[0], ratios, others)
    rejected_bound = _bound(lambda r, other: loss.slopes(other, r)[1], ratios, others)
    return completion_bound, rejected_bound


def _bound(slope: Callable[[float, float], float], ratios: Sequence[float], others: Sequence[float]) -> float:
    sizes = np.array([[abs(slope(ratio, other)) for other in others] for ratio in ratios])
    # Where an exponential overflows, the range ends.
    is_finite = np.isfinite(sizes).all(axis=1)
    sizes, ratios = sizes[is_finite], np.array(ratios)[is_finite].tolist()
    inner = sizes[DECADE // 3 : -DECADE // 3, 1:-1] if len(others) > 1 else sizes[DECADE:-DECADE]
    if sizes.max() > min(GROWTH * inner.max(), LARGEST):
        return math.inf
    best, other = np.unravel_index(sizes.argmax(), sizes.shape)
    nearby = ratios[max(best - 1, 0)], ratios[min(best + 1, len(ratios) - 1)]
    return max(float(sizes.max()), _refined(lambda ratio: abs(slope(ratio, others[other])), *nearby))


def _refined(size: Callable[[float], float], low: float, high: float) -> float:
    # The largest size between two points of the grid, by finer grids around the largest one so far.
    largest = 0.0
    for _ in range(4):
        points = np.linspace(low, high, 11).tolist()
        sizes = [size(point) for point in points]
        best = max(range(len(sizes)), key=sizes.__getitem__)
        low, high, largest = points[max(best - 1, 0)], points[min(best + 1, 10)], max(largest, sizes[best])
    return largest


def _log_ratios(loss: ImpliedLoss, sizes: Sequence[float]) -> list[float]:
    if loss.objective.needs.reference:
        return [*(-size for size in reversed(sizes)), 0.0, *sizes]
    return [-size - REFERENCE for size in reversed(sizes)]
