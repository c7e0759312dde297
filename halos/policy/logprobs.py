"""Log-probs of completion tokens under a causal language model, in float32 whatever the model's precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halos.data.batches import Batch, Chunk


@dataclass(slots=True)
class LogProbs:
    """log π(y_t | x, y_<t) of each completion token.

    ``tokens`` [B, K, C] is zero where ``mask`` [B, K, C] is false. ``hidden`` [B, K, C, H], where asked for, is the
    detached state from which each token was predicted. ``last`` [B, K, H], of completions that were fed whole, is the
    state of the last token, with gradient; ``tokens`` then have none.
    """

    tokens: Tensor
    mask: Tensor
    hidden: Any = None
    last: Any = None

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


def completion_logprobs(model: nn.Module, batch: Batch, *, with_hidden: bool = False) -> LogProbs:
    """Log-probs of every branch of the batch, one forward per chunk; gradient only where a chunk needs it."""
    values, states, lasts = [], [], []
    for chunk in batch.chunks:
        with nullcontext() if chunk.needs_grad else torch.no_grad():
            logprobs, hidden, last = _chunk_logprobs(model, chunk)
        values.append(logprobs)
        lasts.append(last)
        if with_hidden:
            states.append(hidden.detach())
    slots = torch.cat([chunk.slots for chunk in batch.chunks])
    flat = torch.cat(values)
    tokens = flat.new_zeros(batch.mask.numel()).scatter(0, slots, flat).view(batch.mask.shape)
    made = LogProbs(tokens, batch.mask)
    if with_hidden:
        made.hidden = _placed(torch.cat(states), slots, batch.mask.shape)
    if batch.chunks[0].last is not None:
        owners = torch.cat([chunk.owners for chunk in batch.chunks])
        made.last = _placed(torch.cat(lasts), owners, batch.mask.shape[:2])
    return made


def _placed(states: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    # States [N, H] at their places in a grid of this shape, zero elsewhere.
    return states.new_zeros(shape.numel(), states.shape[-1]).index_copy(0, places, states).view(*shape, -1)


def _chunk_logprobs(model: Any, chunk: Chunk) -> tuple[Tensor, Tensor, Any]:
    # No attention mask: padding is on the right and attention is causal, so scored tokens cannot see it.
    with _head_only_at(model.get_output_embeddings(), chunk) as kept:
        logits = model(input_ids=chunk.input_ids, use_cache=False).logits[0]
    if logits.dtype != torch.float64:
        logits = logits.float()
    hidden, last = kept
    return -F.cross_entropy(logits, chunk.targets, reduction="none"), hidden, last


@contextmanager
def _head_only_at(head: nn.Module, chunk: Chunk) -> Iterator[list[Any]]:
    """Within, the LM head sees only the [M, H] states that predict a scored token.

    A hook rather than a call of our own: what a model does to its logits afterwards (scaling, soft-capping) stays its
    own business. The list receives these states, and those [n, H] of the last tokens, or None.
    """
    kept: list[Any] = []

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = args[0]
        if chunk.last is None:
            kept.extend((states[chunk.predicts], None))
        else:  # the loss is about the last states alone: the head keeps no graph
            kept.extend((states[chunk.predicts].detach(), states[chunk.last]))
        return (kept[0].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield kept
    finally:
        handle.remove()
