"""Statistics of the LM head's logits at each scored token, besides the target's log-prob; computed on request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def entropy(logits: Tensor, normaliser: Tensor, targets: Tensor) -> Tensor:
    """H(π(·|x, y_<t)) = −Σ_v π(v) log π(v), in nats."""
    logprobs = logits - normaliser[:, None]
    return -expectation(logprobs.exp(), logprobs)


def log_collision(logits: Tensor, normaliser: Tensor, targets: Tensor) -> Tensor:
    """log Σ_v π(v|x, y_<t)²: of two draws, the log-probability that they are the same token; in nats."""
    return (2 * (logits - normaliser[:, None])).logsumexp(-1)


def token_accuracy(logits: Tensor, normaliser: Tensor, targets: Tensor) -> Tensor:
    """1 where no token is more probable than the target, else 0."""
    return (logits.gather(1, targets[:, None])[:, 0] >= logits.amax(1)).to(logits.dtype)


def expectation(p: Tensor, values: Tensor) -> Tensor:
    """Σ_v p(v) · value(v), where 0 · ∞ is 0: an impossible token contributes nothing."""
    return torch.where(p > 0, p * values, 0.0).sum(-1)


STATISTICS = {"entropy": entropy, "token_accuracy": token_accuracy, "log_collision": log_collision}
"""Functions of logits [M, V], their normaliser log Σ_v exp(logit) [M] and the targets [M], by the name of their metric.

All tensors are float32 or wider, without gradient."""


def measure(names: Sequence[str], logits: Tensor, normaliser: Tensor, targets: Tensor) -> Tensor:
    """Compute the named statistics of M tokens, [M, names]; arguments as in :data:`STATISTICS`."""
    columns = [STATISTICS[name](logits, normaliser, targets) for name in names]
    return torch.stack(columns, 1) if columns else logits.new_empty(len(logits), 0)


def check_statistics(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple.

    Raises:
        ValueError: if a name is unknown or is listed twice.
    """
    known = ", ".join(STATISTICS)
    if not isinstance(names, list | tuple) or not all(name in tuple(STATISTICS) for name in names):
        raise ValueError(f"model.statistics: expected a list of {known}; found {names!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"model.statistics: expected each of {known} at most once, found {list(names)}")
    return tuple(names)
