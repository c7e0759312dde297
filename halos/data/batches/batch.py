"""The tensors of a micro-batch: its examples, its sequences, and the size of the optimizer step that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from halos.data.batches.packing import Pack, map_tensors
from halos.transfer import on_device


@dataclass(slots=True)
class Chunk:
    """n sequences of similar length, padded to T tokens, with M scored tokens.

    Attributes:
        input_ids: [n, T] tokens to feed.
        predicts: [M] the places in the flattened [n, T] grid of the tokens that come before a scored one. They are
            places, not a mask, because indexing by a mask waits for the device to know the size of the result.
        targets: [M] the scored tokens, in the same order.
        slots: [M] their places in the flattened [B, K, C] grid.
        needs_grad: false for chunks into which no gradient flows, such as KTO's mismatched completions.
        last: [n] the places in the flattened [n, T] grid of the completions' last tokens; only if whole completions are
            fed.
        owners: [n] the places of the completions in the flattened [B, K] grid; only if whole completions are fed.
    """

    input_ids: Tensor
    predicts: Tensor
    targets: Tensor
    slots: Tensor
    needs_grad: bool = True
    last: Tensor | None = None
    owners: Tensor | None = None


@dataclass(slots=True)  # not frozen: Lightning's precision plugins rebuild every dataclass that they find in a batch
class StepSize:
    """The size of a whole optimizer step: all ranks, all micro-batches. Losses and metrics divide by it.

    Attributes:
        examples: the sum of the examples' weights, which is their number if all weights are 1.
        tokens: for each branch, the number of scored tokens, each counted by the weight of its example.
        groups: the group of each example; only if examples have scores.
        scores: the score of each example; only if examples have scores.
        members: for each example, the size of its group in the whole data set; only if examples have scores.
        weights: the weight of each example; only if examples have scores, and not all weights are 1.
        views: for records of several views, the size in each view; ``examples`` then counts records.
    """

    examples: float
    tokens: tuple[float, ...]
    groups: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    members: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    views: tuple[StepSize, ...] = ()


@dataclass(slots=True)
class Batch:
    """One rank's examples of one micro-batch.

    For a mixture of several views, the examples are records. K is then the largest number of completions of a record,
    and each of ``views`` is a batch of the records' examples in one view, without tokens of its own.

    Attributes:
        ids: [B] the ids of the examples.
        mask: [B, K, C] true where branch k of example b has a scored token.
        group: [B] a number that examples of the same prompt share.
        step: the size of the whole optimizer step.
        desirable: [B] bool, or None for views without labels.
        scores: [B] rewards, or None. Plain Python, because precision plugins would round a tensor to bf16.
        total_tokens: the number of tokens, prompts included, in all sequences.
        packs: the same tokens as in ``chunks``, for models that can read packed rows. A pack that continues another one
            comes directly after it.
        reference_bits: the bits of the reference's float32 log-probs as int32, which precision plugins do not round.
        weight_bits: the bits of :attr:`weights`, likewise.
        graded_bits: [B, 3] the bits of :attr:`margins`, :attr:`scores_chosen` and :attr:`scores_rejected`, likewise.
        make_chunks: makes :attr:`chunks`.
        made_chunks: :attr:`chunks`, once they are made.
        views: the batches of a mixture's views; empty for losses of one view.
        places: in the batch of a view, the places of its completions in the flattened [B, K] of the records.
    """

    ids: tuple[str, ...]
    mask: Tensor
    group: Tensor
    step: StepSize
    desirable: Tensor | None = None
    scores: tuple[float, ...] | None = None
    total_tokens: int = 0
    packs: tuple[Pack, ...] = ()
    reference_bits: Tensor | None = None
    weight_bits: Tensor | None = None
    graded_bits: Tensor | None = None
    make_chunks: Callable[[], tuple[Chunk, ...]] = tuple
    made_chunks: tuple[Chunk, ...] | None = None
    views: tuple[Batch, ...] = ()
    places: Tensor | None = None

    def view(self, number: int) -> Batch:
        """Return the batch of one view of a mixture; this batch if the loss has one view."""
        return self.views[number] if self.views else self

    @property
    def reference(self) -> Tensor | None:
        """[B, K, C] log π_ref of each completion token in float32, if it was computed beforehand."""
        return _floats(self.reference_bits)

    @property
    def weights(self) -> Tensor | None:
        """[B] float32 weights of the examples; None where all are 1.

        ``Objective.per_example`` and ``per_token`` apply them. A loss reads the weights only for a statistic of its
        own: a mean over examples is ``(weights * values).sum() / weights.sum()``.
        """
        return _floats(self.weight_bits)

    @property
    def margins(self) -> Tensor | None:
        """[B] float32 by how much each chosen completion is preferred, NaN where unknown; None for other views."""
        return self._graded(0)

    @property
    def scores_chosen(self) -> Tensor | None:
        """[B] float32 scores that people gave the chosen completions, NaN where unknown; None for other views."""
        return self._graded(1)

    @property
    def scores_rejected(self) -> Tensor | None:
        """[B] float32 scores that people gave the rejected completions, likewise."""
        return self._graded(2)

    def _graded(self, column: int) -> Tensor | None:
        floats = _floats(self.graded_bits)
        return None if floats is None else floats[:, column]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The batch's sequences with padding. A batch with packs makes them on first use."""
        if self.made_chunks is None:
            # The batch may have been moved to a device after `make_chunks` was set.
            move = partial(on_device, device=self.mask.device)
            self.made_chunks = tuple(map_tensors(chunk, move) for chunk in self.make_chunks())
        return self.made_chunks

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy the batch to a device."""
        return map_tensors(self, partial(Tensor.to, device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy the batch to pinned memory (called by the data loader)."""
        return map_tensors(self, Tensor.pin_memory)


def _floats(bits: Tensor | None) -> Tensor | None:
    return None if bits is None else bits.view(torch.float32)
