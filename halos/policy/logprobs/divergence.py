"""The divergence between two models' next-token distributions, with a few rows of logits in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from halos.policy.adapters import head_delta
from halos.policy.logprobs.chunked_head import LogitShape
from halos.policy.logprobs.completions import LogProbs
from halos.policy.logprobs.head import lm_head, logit_shape
from halos.policy.logprobs.token_statistics import expectation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 256
"""Rows of logits of each model that exist at a time, unless there is a smaller ``model.head_chunk``."""


def check_divergence(model: PreTrainedModel) -> LogitShape:
    """Return what the model does to its head's logits.

    Raises:
        ValueError: if its logits cannot be computed from its last states alone.
    """
    shape = logit_shape(model)
    if shape is None:
        found = f"found that of {type(model).__name__}"
        hint = "choose another loss.reference_point"
        raise ValueError(f"divergence: expected a linear LM head that each rank has whole, {found}; {hint}")
    return shape


@torch.no_grad()
def divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """Σ_v π_θ(v) (log π_θ(v) − log π_ref(v)), 0 or more, from the log-probs of all tokens v, [M, V]; [M]."""
    # Rounding alone can make the sum negative where the distributions are equal.
    return expectation(policy.exp(), policy - reference).clamp(min=0)


@torch.no_grad()
def distributions(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Compute log π(·|…) from the states of the last layer [M, H], in float32 or better; [M, V]."""
    head = lm_head(model)
    logits = linear(states, head.weight, head.bias)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if (delta := head_delta(head, states)) is not None:
        low, up = delta
        wide = wide + linear(low, up).to(wide)
    return check_divergence(model)(wide).log_softmax(-1)


@torch.no_grad()
def completion_divergence(
    policy: LogProbs,
    reference: LogProbs,
    policy_distributions: Callable[[Tensor], Tensor],
    reference_distributions: Callable[[Tensor], Tensor],
    rows: int = ROWS,
) -> Tensor:
    """Compute KL(π_θ ‖ π_ref) between the next-token distributions at each completion token, [B, K, C].

    Args:
        policy, reference: log-probs of the same batch, with the hidden states of each model.
        policy_distributions, reference_distributions: :func:`distributions` of each model.
        rows: rows of logits of each model that exist at a time.
    """
    assert policy.hidden is not None
    assert reference.hidden is not None
    states = zip(policy.hidden[policy.mask].split(rows), reference.hidden[policy.mask].split(rows), strict=True)
    parts = [divergence(policy_distributions(own), reference_distributions(other)) for own, other in states]
    values = torch.cat(parts)
    return values.new_zeros(policy.mask.shape).masked_scatter(policy.mask, values)
