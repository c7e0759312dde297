"""Replies of the policy to held-out prompts, and the metrics computed from them: KL, length, truncation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True, slots=True)
class Reply:
    """A sampled reply.

    Attributes:
        prompt: the number of its prompt.
        ids: its token ids, end-of-turn token included.
        truncated: whether the limit ended it, rather than its end-of-turn token.
        divergence: Σ_t KL(π_θ(·|x, y_<t) ‖ π_ref(·|x, y_<t)) along it, in nats; None if it was not computed.
        before: token ids of the reference's reply to the same prompt; None if it was not drawn.
    """

    prompt: int
    ids: list[int]
    truncated: bool
    divergence: float | None = None
    before: list[int] | None = None


def reply_metrics(replies: Sequence[Reply]) -> dict[str, float]:
    """Compute the metrics of one sampled validation.

    The mean of ``divergence`` over samples of the policy estimates KL(π_θ ‖ π_ref) without bias, because each token's
    log-ratio is replaced by its expectation given the tokens before it (Rao-Blackwell). No term is negative.

    Args:
        replies: one for each prompt.

    Returns:
        ``samples/length`` in tokens, ``samples/truncated`` (a share); where divergences were computed ``kl`` in nats
        per reply, ``kl_per_token``, and from two replies on ``kl_error``, the standard error of ``kl``.
    """
    tokens = sum(len(reply.ids) for reply in replies)
    metrics = {
        "samples/length": tokens / len(replies),
        "samples/truncated": fmean(float(reply.truncated) for reply in replies),
    }
    divergences = [reply.divergence for reply in replies if reply.divergence is not None]
    if len(divergences) == len(replies):
        metrics |= {"kl": fmean(divergences), "kl_per_token": math.fsum(divergences) / tokens}
        if len(divergences) > 1:
            metrics["kl_error"] = stdev(divergences) / len(divergences) ** 0.5
    return metrics
