"""Log-probs of completion tokens under a causal language model, in float32 whatever the model's precision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from halos.data.batches.batch import Batch, Chunk
from halos.data.batches.packing import Pack
from halos.policy.logprobs.head import HeadOptions, HeadResults, forward_scored, run
from halos.policy.logprobs.packed import can_pack, check_packing, pack_logprobs
from halos.policy.router import padded_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class LogProbs:
    """log π(y_t | x, y_<t) of each completion token, in a grid of B examples, K branches and C tokens.

    Attributes:
        tokens: log-probs [B, K, C], zero where ``mask`` is false.
        mask: true where a branch has a token [B, K, C].
        hidden: the state that predicts each token [B, K, C, H], detached; None unless requested.
        last: the state of each completion's last token [B, K, H], with gradient, if completions are fed whole;
            ``tokens`` then have no gradient.
        statistics: the statistics of :mod:`halos.policy.logprobs.token_statistics` that were requested
            [B, K, C, names], zero where ``mask`` is false.
        log_collision: log Σ_v π(v|x, y_<t)² at each completion token, [B, K, C], zero where ``mask`` is false, without
            gradient; None unless requested.
        divergence: KL(π_θ ‖ π_ref) between the next-token distributions that predict each token, over the whole
            vocabulary, [B, K, C], zero where ``mask`` is false, without gradient; None unless requested.
        load: the load of a mixture's experts, from the branches with gradient, [2, E]; None unless requested. See
            :func:`halos.policy.router.expert_load`.
    """

    tokens: Tensor
    mask: Tensor
    hidden: Tensor | None = None
    last: Tensor | None = None
    statistics: Tensor | None = None
    load: Tensor | None = None
    divergence: Tensor | None = None
    log_collision: Tensor | None = None

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

    def of(self, batch: Batch) -> LogProbs:
        """The log-probs for ``batch``, which may be one view of a mixture (``Batch.views``), [B, K, C] of that batch.

        For a batch that is not a view these are all log-probs. A view has no load of experts.
        """
        places = batch.places
        if places is None:
            return self

        def of_view(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.flatten(0, 1)[places]

        others = {name: of_view(getattr(self, name)) for name in _BY_COMPLETION}
        return LogProbs(self.tokens.flatten(0, 1)[places], batch.mask, **others)


_BY_COMPLETION = ("hidden", "last", "statistics", "log_collision", "divergence")


def completion_logprobs(model: PreTrainedModel, batch: Batch, options: HeadOptions | None = None) -> LogProbs:
    """Compute the log-probs of every branch of the batch.

    Packed rows are used if the batch has them and the model can read them; otherwise there is one forward for each
    chunk of padded rows. Branches that the batch marks as needing no gradient get none. If the batch has several
    parts (``data.max_tokens_per_batch``), each part is computed again in the backward pass, so that the
    activations of only one part are in memory at a time.

    Args:
        model: a causal language model.
        batch: the tokens, on the model's device.
        options: how the LM head is computed, and what is returned besides log-probs.

    Raises:
        ValueError: if a batch in several parts meets a model that cannot read packed rows.
    """
    if sum(pack.needs_grad for pack in batch.packs) > 1:
        check_packing(model)
    options = options or HeadOptions()
    last_states: list[Tensor] = []
    inputs: Sequence[Pack | Chunk] = batch.packs if batch.packs and can_pack(model) else batch.chunks
    if inputs is batch.packs:
        results = _pack_results(model, batch.packs, options)
    else:
        results = [_chunk_results(model, chunk, options, last_states) for chunk in batch.chunks]
    shape, slots = batch.mask.shape, torch.cat([item.slots for item in inputs])
    values = torch.cat([result.logprobs for result in results])
    tokens = values.new_zeros(batch.mask.numel()).scatter(0, slots, values).view(shape)
    logprobs = LogProbs(tokens, batch.mask)
    if options.with_states:
        states = torch.cat([result.states for result in results if result.states is not None])
        logprobs.hidden = _in_grid(states, slots, shape)
    if options.statistics:
        logprobs.statistics = _in_grid(torch.cat([result.statistics for result in results]), slots, shape)
    if loads := [result.load for result in results if result.load is not None]:
        logprobs.load = torch.stack(loads).sum(0)
    if last_states:
        owners = torch.cat([chunk.owners for chunk in batch.chunks if chunk.owners is not None])
        logprobs.last = _in_grid(torch.cat(last_states), owners, shape[:2])
    return logprobs


def _in_grid(vectors: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    # Vectors [N, D] → [*shape, D], zero where none belongs.
    return vectors.new_zeros(shape.numel(), vectors.shape[-1]).index_copy(0, places, vectors).view(*shape, -1)


def _pack_results(model: PreTrainedModel, packs: Sequence[Pack], options: HeadOptions) -> list[HeadResults]:
    # A part is a pack with gradient and the packs after it that continue its prompts.
    starts = [index for index, pack in enumerate(packs) if pack.needs_grad]
    parts = [packs[start:stop] for start, stop in pairwise([*starts, len(packs)])]

    def compute(_: Tensor, part: Sequence[Pack]) -> list[HeadResults]:
        # checkpoint() restores random numbers only for the devices of its direct arguments, and does not look for
        # tensors inside a Pack. Without the unused tensor, dropout would differ in the second run.
        return pack_logprobs(model, part, options)

    recomputed = len(parts) > 1 and torch.is_grad_enabled()
    run_part = partial(checkpoint, compute, use_reentrant=False) if recomputed else compute
    return [result for part in parts for result in run_part(part[0].input_ids, part)]


def _chunk_results(
    model: PreTrainedModel, chunk: Chunk, options: HeadOptions, last_states: list[Tensor]
) -> HeadResults:
    def choose(states: Tensor) -> Tensor:
        chosen = states.flatten(0, 1)[chunk.predicts]
        # If the loss depends only on the last states, the head needs no graph.
        return chosen if chunk.last is None else chosen.detach()

    with nullcontext() if chunk.needs_grad else torch.no_grad():
        # No attention mask: padding is on the right and attention is causal, so scored tokens cannot see it.
        forward = partial(run, model, input_ids=chunk.input_ids)
        weights = padded_weights(chunk) if chunk.needs_grad else None
        scored, states = forward_scored(model, forward, chunk.targets, choose, options, weights)
        if chunk.last is not None:
            last_states.append(states.flatten(0, 1)[chunk.last])
    return scored
