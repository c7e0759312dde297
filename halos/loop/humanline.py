"""Humanline: token log-ratios clamped to the range that people perceive (Liu et al. 2025, arXiv 2509.24207)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from halos.checks import is_number
from halos.policy.logprobs.completions import LogProbs


@dataclass(frozen=True, slots=True, kw_only=True)
class Humanline:
    """Clamps log π_θ(y_t|·) − log π_ref(y_t|·) to [log ε_P, log ε_R], before any loss that has a reference.

    A token outside the range has no gradient. The authors' recipe also moves the reference to the policy every k
    steps: ``reference_sync`` with ``every=k`` and ``alpha=1``.

    Args:
        log_epsilon_P: log ε_P in nats, below 0, as the policy starts at a log-ratio of 0. The default is that of the
            authors' code (HALOs).
        log_epsilon_R: log ε_R in nats, above 0.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    log_epsilon_P: float = -1.0
    log_epsilon_R: float = 1.5

    def __post_init__(self) -> None:
        for name, sign in (("log_epsilon_P", -1), ("log_epsilon_R", 1)):
            value = getattr(self, name)
            if not (is_number(value) and 0 < sign * value < math.inf):
                side = "below" if sign < 0 else "above"
                raise ValueError(f"humanline.{name}: expected a number {side} 0, found {value!r}")

    def clamp(self, policy: LogProbs, reference: LogProbs) -> LogProbs:
        """The policy's log-probs, with their log-ratios to the reference clamped."""
        low, high = reference.tokens + self.log_epsilon_P, reference.tokens + self.log_epsilon_R
        return replace(policy, tokens=policy.tokens.clamp(low, high))
