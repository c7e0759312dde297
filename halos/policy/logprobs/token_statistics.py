"""What else the LM head's logits say at each scored token, besides the target's log-prob; computed where asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def entropy(logits: Tensor, normaliser: Tensor, targets: Tensor) -> Tensor:
    """H(π(·|x, y_<t)) = −Σ_v π(v) log π(v), in nats."""
    logprobs = logits - normaliser[:, None]
    return -expectation(logprobs.exp(), logprobs)


def token_accuracy(logits: Tensor, normaliser: Tensor, targets: Tensor) -> Tensor:
    """1 where no token is more probable than the target, else 0."""
    return (logits.gather(1, targets[:, None])[:, 0] >= logits.amax(1)).to(logits.dtype)


def expectation(p: Tensor, values: Tensor) -> Tensor:
    """Σ_v p(v) · value(v), where 0 · ∞ is 0: what never happens adds nothing."""
    return torch.where(p > 0, p * values, 0.0).sum(-1)


STATISTICS = {"entropy": entropy, "token_accuracy": token_accuracy}
"""By the name of their metric: functions of logits [M, V], log Σ_v exp(logit) [M] and the targets [M], in float32 or
wider, without gradient."""


def measure(names: Sequence[str], logits: Tensor, normaliser: Tensor, targets: Tensor) -> Tensor:
    """The named statistics of M tokens, [M, names]."""
    found = [STATISTICS[name](logits, normaliser, targets) for name in names]
    return torch.stack(found, 1) if found else logits.new_empty(len(logits), 0)


def check_statistics(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each of which is known and there once; raises ``ValueError`` otherwise."""
    known = ", ".join(STATISTICS)
    if not isinstance(names, list | tuple) or not all(name in tuple(STATISTICS) for name in names):
        raise ValueError(f"model.statistics: expected a list of {known}; found {names!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"model.statistics: expected each of {known} at most once, found {list(names)}")
    return tuple(names)
