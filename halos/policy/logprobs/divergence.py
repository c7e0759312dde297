"""The divergence between two models' next-token distributions, with a few rows of logits in memory at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halos.policy.logprobs.chunked_head import LogitShape
from halos.policy.logprobs.completions import LogProbs
from halos.policy.logprobs.head import ReadLogits, head_reader, logit_shape
from halos.policy.logprobs.token_statistics import expectation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 256
"""Rows of logits of each model that exist at a time, unless ``model.head_chunk`` is smaller."""


def check_divergence(model: PreTrainedModel) -> LogitShape:
    """Return what the model does to its head's logits.

    Raises:
        ValueError: if its logits cannot be computed from its last states alone.
    """
    shape = logit_shape(model)
    if shape is None:
        found = f"found that of {type(model).__name__}"
        raise ValueError(f"divergence: expected a linear LM head that each rank has whole, {found}")
    return shape


@torch.no_grad()
def divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """Σ_v π_θ(v) (log π_θ(v) − log π_ref(v)), 0 or more, from the log-probs of all tokens v, [M, V]; [M]."""
    # Rounding alone can make the sum negative where the distributions are equal.
    return expectation(policy.exp(), policy - reference).clamp(min=0)


@torch.no_grad()
def divergence_reader(model: PreTrainedModel, logprobs: LogProbs) -> ReadLogits:
    """Return what computes the logits at the completion tokens of a batch, from log-probs with hidden states.

    Raises:
        ValueError: see :func:`check_divergence`.
    """
    assert logprobs.hidden is not None
    return head_reader(model, logprobs.hidden[logprobs.mask], check_divergence(model))


@torch.no_grad()
def completion_divergence(
    mask: Tensor, policy: ReadLogits, reference: ReadLogits, head_chunk: int | str | None = None
) -> Tensor:
    """Compute KL(π_θ ‖ π_ref) between the next-token distributions at each completion token, [B, K, C].

    Args:
        mask: where there are completion tokens, [B, K, C].
        policy, reference: compute the logits of these tokens under each model.
        head_chunk: ``model.head_chunk``, which can lower the number of rows of logits that exist at a time.
    """
    rows = min(head_chunk, ROWS) if isinstance(head_chunk, int) else ROWS
    parts = []
    for start in range(0, int(mask.sum()), rows):
        part = slice(start, start + rows)
        parts.append(divergence(policy(part).log_softmax(-1), reference(part).log_softmax(-1)))
    values = torch.cat(parts)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
