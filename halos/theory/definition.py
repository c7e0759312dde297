"""Whether an objective is a human-aware loss (HALO), checked numerically."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halos.testing.examples import Make
from halos.theory.values import ImpliedLoss, Side, sides

POINTS, REACH = 481, 60.0
"""The grid: POINTS log-ratios from -REACH to REACH nats, 0 among them."""
TOLERANCE = 1e-9


LOG_RATIO, RATIO = "log π_θ/π_ref", "π_θ/π_ref − 1"
REWARDS: dict[str, Callable[[Tensor], Tensor]] = {LOG_RATIO: lambda r: r, RATIO: torch.expm1}
"""Implied rewards: increasing functions of the log-ratio, 0 where policy and reference agree."""
COMPARED_LOG_RATIOS = {LOG_RATIO: 1.0, RATIO: 0.0}
"""Log-ratio of the completions that a completion is compared with, by reward. For the log-ratio it is above 0, because
KTO clamps its reference point at 0; for the ratio it is PPO's reference point."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of :func:`is_halo`, true if every condition holds for one of the implied rewards.

    Attributes:
        reward: the implied reward for which the conditions hold, or None.
        failures: the conditions that fail for the first implied reward, if there is none for which all hold.
    """

    reward: str | None
    failures: tuple[str, ...] = field(default=())

    def __bool__(self) -> bool:
        return self.reward is not None

    def __str__(self) -> str:
        return f"HALO, with reward {self.reward}" if self else "not a HALO: " + "; ".join(self.failures)


def is_halo(make: Make, *, terms: Collection[str] | None = None) -> Verdict:
    """Check the definition of human-aware losses on a grid of rewards.

    A loss is human-aware if there are an implied reward r, a reference point z = E_Q[r(x, y')], a sign a ∈ {−1, +1}
    for each example, and a value function v that is non-decreasing everywhere and concave in (0, ∞), such that

        f(x, y) = a · v(r(x, y) − z) + C.

    This is Definition 3.4 of the paper (arXiv 2402.01306) as published at ICML 2024, with one freedom that its earlier
    versions have and the later ones do not: r may be any increasing function of log π_θ/π_ref. PPO-Clip needs it: its
    value is linear up to the clip in the ratio, and so convex there in the log-ratio. Under the earliest versions,
    where r need not involve a reference model at all, SLiC's calibration term is a HALO too; here it is not.

    Args:
        make: an objective's class, or a ``functools.partial`` of it with parameters.
        terms: names of the terms of the loss to include; all of them if None. PPO-Clip is PPO's ``policy`` term.
    """
    losses = {side: ImpliedLoss(make, side, terms) for side in sides(make(None))}
    # These two do not depend on the implied reward, so they are checked once.
    shared = [failure for loss in losses.values() for failure in (*_implied_reward(loss), *_reference_point(loss))]
    failures = {reward: shared + _value_function(losses, reward) for reward in REWARDS}
    for reward, failed in failures.items():
        if not failed:
            return Verdict(reward)
    return Verdict(None, tuple(dict.fromkeys(failures[LOG_RATIO])))


def _implied_reward(loss: ImpliedLoss) -> list[str]:
    if abs(loss(1.0, 0.7, shift=2.0) - loss(1.0, 0.7)) > TOLERANCE:
        return ["the loss is not a function of π_θ/π_ref: it changes where both change alike"]
    if max(abs(loss(r, 0.7) - loss(0.0, 0.7)) for r in (-2.0, -0.1, 0.1, 2.0)) < TOLERANCE:
        return ["the loss does not depend on π_θ"]
    return []


def _reference_point(loss: ImpliedLoss) -> list[str]:
    # Either the point moves with the completions compared with, or those have no effect: the point is then a constant,
    # such as E_{y' ~ π_ref}[π_θ/π_ref] = 1.
    of_difference = moves_with_others(loss) or ignores_others(loss)
    return [] if of_difference else ["the loss is not a function of a difference of rewards"]


def moves_with_others(loss: ImpliedLoss) -> bool:
    """Whether the loss stays the same where all log-ratios change alike."""
    return abs(loss(0.5 + 2.0, 0.3 + 2.0) - loss(0.5, 0.3)) < TOLERANCE


def ignores_others(loss: ImpliedLoss) -> bool:
    """Whether a completion's own effect on the loss is the same whatever it is compared with."""
    effects = [loss(0.5, others) - loss(0.0, others) for others in (0.3, 2.3)]
    return abs(effects[0] - effects[1]) < TOLERANCE


def _value_function(losses: dict[Side, ImpliedLoss], reward: str) -> list[str]:
    log_ratios = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
    gains = REWARDS[reward](log_ratios)
    failures = []
    for side, loss in losses.items():
        others = COMPARED_LOG_RATIOS[reward]
        value = torch.tensor([loss(others + r, others) for r in log_ratios.tolist()], dtype=torch.float64)
        # The sign a of the definition: chosen so that the value increases around the reference point.
        value = value if value[POINTS // 2 + 1] > value[POINTS // 2 - 1] else -value
        failures += [f"{side.name.lower()} completions: {failure}" for failure in _shape(gains, value)]
    return failures


def _shape(gains: Tensor, value: Tensor) -> list[str]:
    failures = []
    # Relative to the value's size: PPO's ratio reaches e^60, where rounding is far above any fixed tolerance.
    falls = value.diff() < -TOLERANCE * (1 + value[1:].abs())
    if falls.any():
        failures.append(f"the value decreases at a gain of {gains[1:][falls][0]:.3g}")
    slopes = value.diff() / gains.diff()
    bends = (slopes.diff() > TOLERANCE * (1 + slopes[1:].abs())) & (gains[:-2] >= 0)
    if bends.any():
        failures.append(f"the value is not concave at a gain of {gains[1:-1][bends][0]:.3g}")
    return failures
