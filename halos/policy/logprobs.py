"""Log-probs of completion tokens under a causal language model, in float32 whatever the model's precision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halos.data.batches import Batch, Chunk
from halos.data.packing import Pack
from halos.policy.head import forward_scored
from halos.policy.packed import can_pack, pack_logprobs


@dataclass(slots=True)
class LogProbs:
    """log π(y_t | x, y_<t) of each completion token.

    ``tokens`` [B, K, C] is zero where ``mask`` [B, K, C] is false. ``hidden`` [B, K, C, H], where asked for, is the
    state from which each token was predicted, detached unless asked otherwise.
    """

    tokens: Tensor
    mask: Tensor
    hidden: Any = None

    @property
    def sum(self) -> Tensor:
        """Σ_t log π(y_t | x, y_<t) of each completion, [B, K]."""
        return self.tokens.sum(-1)

    @property
    def count(self) -> Tensor:
        """Completion tokens, end-of-turn token included, [B, K]."""
        return self.mask.sum(-1)


def completion_logprobs(
    model: nn.Module,
    batch: Batch,
    *,
    with_hidden: bool = False,
    detach_hidden: bool = True,
    head_chunk: int | None = None,
) -> LogProbs:
    """Log-probs of every branch of the batch; gradient only where the batch says that it is needed.

    From packed rows where the batch has them and the model can read them, else one forward per chunk. ``head_chunk``:
    see :func:`halos.policy.head.forward_scored`. Without ``detach_hidden`` gradient flows through ``hidden`` too.
    """
    packed = bool(batch.packs) and can_pack(model)
    parts: Sequence[Pack | Chunk] = batch.packs if packed else batch.chunks
    found = (
        pack_logprobs(model, batch.packs, head_chunk=head_chunk)
        if packed
        else _chunk_logprobs(model, batch, head_chunk)
    )
    slots = torch.cat([part.slots for part in parts])
    flat = torch.cat([values for values, _ in found])
    tokens = flat.new_zeros(batch.mask.numel()).scatter(0, slots, flat).view(batch.mask.shape)
    if not with_hidden:
        return LogProbs(tokens, batch.mask)
    state = torch.cat([states.detach() if detach_hidden else states for _, states in found])
    grid = state.new_zeros(batch.mask.numel(), state.shape[-1]).index_copy(0, slots, state)
    return LogProbs(tokens, batch.mask, grid.view(*batch.mask.shape, -1))


def _chunk_logprobs(model: Any, batch: Batch, head_chunk: int | None) -> list[tuple[Tensor, Tensor]]:
    # No attention mask: padding is on the right and attention is causal, so scored tokens cannot see it.
    found = []
    for chunk in batch.chunks:
        with nullcontext() if chunk.needs_grad else torch.no_grad():
            forward = partial(model, input_ids=chunk.input_ids, use_cache=False)
            scored = forward_scored(model, forward, chunk.targets, partial(_at, chunk.predicts), head_chunk=head_chunk)
        found.append((scored.logprobs, scored.states))
    return found


def _at(places: Tensor, states: Tensor) -> Tensor:
    return states[places]
