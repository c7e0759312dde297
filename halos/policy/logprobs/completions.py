"""Log-probs of completion tokens under a causal language model, in float32 whatever the model's precision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from halos.data.batches.collate import Batch, Chunk
from halos.data.batches.packing import Pack
from halos.policy.logprobs.head import forward_scored
from halos.policy.logprobs.packed import can_pack, check_packing, pack_logprobs


@dataclass(slots=True)
class LogProbs:
    """log π(y_t | x, y_<t) of each completion token.

    ``tokens`` [B, K, C] is zero where ``mask`` [B, K, C] is false. ``hidden`` [B, K, C, H], where asked for, is the
    state from which each token was predicted, detached unless asked otherwise. ``last`` [B, K, H], of completions that
    were fed whole, is the state of the last token, with gradient; ``tokens`` then have none. ``statistics``
    [B, K, C, names] are those of :mod:`.token_statistics` that were asked for, zero where ``mask`` is false.
    """

    tokens: Tensor
    mask: Tensor
    hidden: Any = None
    last: Any = None
    statistics: Any = None

    @property
    def sum(self) -> Tensor:
        """Σ_t log π(y_t | x, y_<t) of each completion, [B, K]."""
        return self.tokens.sum(-1)

    @property
    def count(self) -> Tensor:
        """Completion tokens, end-of-turn token included, [B, K]."""
        return self.mask.sum(-1)

    @property
    def mean(self) -> Tensor:
        """The mean of log π(y_t | x, y_<t) over each completion's tokens, [B, K]."""
        return self.sum / self.count


def completion_logprobs(
    model: nn.Module,
    batch: Batch,
    *,
    with_hidden: bool = False,
    head_chunk: int | None = None,
    statistics: Sequence[str] = (),
) -> LogProbs:
    """Log-probs of every branch of the batch; gradient only where the batch says that it is needed.

    From packed rows where the batch has them and the model can read them, else one forward per chunk. Where the batch
    has them in several parts (``max_tokens``), the backward pass runs each part again, so that the activations of one
    alone exist at a time. ``head_chunk``, ``statistics``: see :func:`halos.policy.logprobs.head.forward_scored`.
    """
    if sum(part.needs_grad for part in batch.packs) > 1:
        check_packing(model)
    packed = bool(batch.packs) and can_pack(model)
    parts: Sequence[Pack | Chunk] = batch.packs if packed else batch.chunks
    lasts: list[Tensor] = []
    head = {"head_chunk": head_chunk, "statistics": statistics}
    if packed:
        found = _pack_logprobs(model, batch.packs, head | {"with_states": with_hidden})
    else:
        found = _chunk_logprobs(model, batch, head, lasts)
    slots = torch.cat([part.slots for part in parts])
    flat = torch.cat([values for values, _, _ in found])
    tokens = flat.new_zeros(batch.mask.numel()).scatter(0, slots, flat).view(batch.mask.shape)
    made = LogProbs(tokens, batch.mask)
    if with_hidden:
        made.hidden = _placed(torch.cat([states.detach() for _, _, states in found]), slots, batch.mask.shape)
    if statistics:
        made.statistics = _placed(torch.cat([measured for _, measured, _ in found]), slots, batch.mask.shape)
    if lasts:
        owners = torch.cat([chunk.owners for chunk in batch.chunks if chunk.owners is not None])
        made.last = _placed(torch.cat(lasts), owners, batch.mask.shape[:2])
    return made


def _placed(states: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    # States [N, H] at their places in a grid of this shape, zero elsewhere.
    return states.new_zeros(shape.numel(), states.shape[-1]).index_copy(0, places, states).view(*shape, -1)


Found = list[tuple[Tensor, Tensor, Any]]
"""Of each part the log-probs [S], statistics [S, names] and, where asked for, states [S, H]."""


def _pack_logprobs(model: Any, packs: Sequence[Pack], head: dict[str, Any]) -> Found:
    edges = [number for number, part in enumerate(packs) if part.needs_grad]
    parts = [packs[a:z] for a, z in pairwise([*edges, len(packs)])]
    if len(parts) == 1 or not torch.is_grad_enabled():
        return [found for part in parts for found in pack_logprobs(model, part, **head)]
    run = partial(checkpoint, _part_logprobs, use_reentrant=False)
    return [found for part in parts for found in run(part[0].input_ids, model, part, **head)]


def _part_logprobs(_: Tensor, model: Any, part: Sequence[Pack], **head: Any) -> Found:
    # Checkpointing keeps the random numbers of the devices of those tensors that it is given itself.
    return pack_logprobs(model, part, **head)


def _chunk_logprobs(model: Any, batch: Batch, head: dict[str, Any], lasts: list[Tensor]) -> Found:
    # No attention mask: padding is on the right and attention is causal, so scored tokens cannot see it.
    found = []
    for chunk in batch.chunks:
        with nullcontext() if chunk.needs_grad else torch.no_grad():
            forward = partial(model, input_ids=chunk.input_ids, use_cache=False)
            choose = partial(_choose, chunk, lasts)
            scored = forward_scored(model, forward, chunk.targets, choose, **head)
        found.append((scored.logprobs, scored.statistics, scored.states))
    return found


def _choose(chunk: Chunk, lasts: list[Tensor], states: Tensor) -> Tensor:
    if chunk.last is None:
        return states[chunk.predicts]
    lasts.append(states[chunk.last])
    return states[chunk.predicts].detach()  # the loss is about the last states alone: the head keeps no graph
