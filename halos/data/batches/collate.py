"""Collates token rows to the tensors of a micro-batch.

A batch has B examples with K branches (completions) each. Every sequence is a prompt followed by one branch. Each
scored token has a place in a grid [B, K, C], where C is the largest number of scored tokens in a branch. Tokens of a
completion that are not scored, such as a user's turn between two of the assistant's, are fed to the model and have no
place:

    rows → places (b, k) sorted by length → chunks, each padded on the right to its own longest sequence
                                          → scored tokens → slots in the flattened grid

Sorting keeps padding small, so the order of sequences in a chunk is not that of the examples: slots say where a
log-prob belongs. They are recorded by position when the row is written, and never found again from token values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from halos.data.batches.order import MicroBatch
from halos.data.batches.packing import Pack, divide, map_tensors, pack
from halos.data.batches.reference_table import ReferenceTable
from halos.data.rows.token_rows import Row, graded, group_sizes
from halos.transfer import on_device

PAD = 0
"""The id of padding. Any id would do: attention is causal and padding is on the right, so no scored token attends to
it."""


@dataclass(slots=True)
class Chunk:
    """n sequences of similar length, padded to T tokens, with M scored tokens.

    Attributes:
        input_ids: [n, T] tokens to feed.
        predicts: [M] the places in the flattened [n, T] grid of the tokens that come before a scored one. Places, not
            a mask: indexing by a mask waits for the device, as its result has as many rows as the mask has ones.
        targets: [M] the scored tokens, in the same order.
        slots: [M] their places in the flattened [B, K, C] grid.
        needs_grad: false for chunks into which no gradient flows, such as KTO's mismatched completions.
        last: [n] the places in the flattened [n, T] grid of the completions' last tokens; only where whole completions
            are fed.
        owners: [n] the places of the completions in the flattened [B, K] grid; only where whole completions are fed.
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
        examples: the sum of the examples' weights: their number, if none has a weight.
        tokens: for each branch, the sum over its scored tokens of their example's weight.
        groups: the group of each example; only where examples have scores.
        scores: the score of each example; only where examples have scores.
        members: for each example, the size of its group in the whole data set; only where examples have scores.
        weights: the weight of each example; only where examples have scores, and not all weights are 1.
    """

    examples: float
    tokens: tuple[float, ...]
    groups: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    members: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(slots=True)
class Batch:
    """One rank's examples of one micro-batch.

    Attributes:
        ids: [B] the ids of the examples.
        mask: [B, K, C] true where branch k of example b has a scored token.
        group: [B] a number that examples of the same prompt share.
        step: the size of the whole optimizer step.
        desirable: [B] bool, or None for views without labels.
        scores: [B] rewards, or None. Plain Python, because precision plugins would round a tensor to bf16.
        total_tokens: the number of tokens, prompts included, in all sequences.
        packs: the same tokens as in ``chunks``, for models that can read packed rows. A pack that continues another one
            follows it.
        reference_bits: the bits of float32 log-probs as int32, for the same reason as ``scores``.
        weight_bits: likewise, see :attr:`weights`.
        graded_bits: likewise [B, 3], see :attr:`margins` and :attr:`scores_chosen`.
        pad: makes the chunks.
        padded: the chunks, once they are made.
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
    pad: Callable[[], tuple[Chunk, ...]] = tuple
    padded: tuple[Chunk, ...] | None = None

    @property
    def reference(self) -> Tensor | None:
        """[B, K, C] log π_ref of each completion token in float32, if it was computed beforehand."""
        return _floats(self.reference_bits)

    @property
    def weights(self) -> Tensor | None:
        """[B] float32 weights of the examples; None where all are 1.

        ``Objective.per_example`` and ``per_token`` weigh losses by themselves. A loss needs the weights only for a
        statistic of its own: a mean over examples is ``(weights * values).sum() / weights.sum()``.
        """
        return _floats(self.weight_bits)

    @property
    def margins(self) -> Tensor | None:
        """[B] float32 by how much each chosen completion is preferred, NaN where unknown; None but for pairs."""
        return self._graded(0)

    @property
    def scores_chosen(self) -> Tensor | None:
        """[B] float32 scores that people gave the chosen completions, NaN where unknown; None but for pairs."""
        return self._graded(1)

    @property
    def scores_rejected(self) -> Tensor | None:
        """[B] float32 scores that people gave the rejected completions, NaN where unknown; None but for pairs."""
        return self._graded(2)

    def _graded(self, column: int) -> Tensor | None:
        floats = _floats(self.graded_bits)
        return None if floats is None else floats[:, column]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The batch's sequences with padding. A batch with packs makes them on first use."""
        if self.padded is None:
            # The batch may have moved to a device since pad was set.
            move = partial(on_device, device=self.mask.device)
            self.padded = tuple(map_tensors(chunk, move) for chunk in self.pad())
        return self.padded

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy the batch to a device."""
        return map_tensors(self, partial(Tensor.to, device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy the batch to pinned memory (called by the data loader)."""
        return map_tensors(self, Tensor.pin_memory)


def collate(
    rows: Sequence[Row],
    *,
    step: StepSize | None = None,
    mismatched: bool = False,
    chunks: int = 1,
    whole: bool = False,
    packing: bool = False,
    share_prompts: bool = True,
    max_tokens: int | None = None,
    reference: ReferenceTable | None = None,
) -> Batch:
    """Collate the rows of one micro-batch.

    Args:
        rows: B rows with K branches each.
        step: the size of the optimizer step; None: these rows are the step.
        mismatched: the last branch is KTO's y', which needs no gradient.
        chunks: the number of length-sorted chunks into which the trained and the mismatched sequences are each divided.
            It is a constant, so that all ranks run equally many forwards.
        whole: feed each completion's last token too, for objectives that read its state. Excludes ``packing``.
        packing: add the same tokens as packs.
        share_prompts: branches of one prompt share it in a pack.
        max_tokens: the maximum number of tokens in a pack; rows are divided into several packs to keep it. None: no
            maximum.
        reference: the source of the reference's log-probs, if they were computed beforehand.
    """
    lengths = torch.tensor([_scored_counts(row) for row in rows])
    width = int(lengths.max())
    packs: list[Pack] = []
    if packing and not whole:  # packs leave out each completion's last token
        for part in divide(rows, max_tokens, share_prompts=share_prompts):
            packs += pack(rows[part], width=width, mismatched=mismatched, share_prompts=share_prompts, start=part.start)
    # Padded tensors take memory that packed rows never use, so with packs they are made only when they are read.
    pad = partial(_padded, tuple(rows), width, chunks, mismatched=mismatched, whole=whole)
    return Batch(
        ids=tuple(row.id for row in rows),
        mask=torch.arange(width) < lengths[:, :, None],
        group=torch.tensor([row.group for row in rows]),
        step=step or step_size(rows),
        desirable=None if rows[0].desirable is None else torch.tensor([bool(row.desirable) for row in rows]),
        scores=None if rows[0].score is None else _scores(rows),
        total_tokens=sum(len(row.prompt) + len(branch) for row in rows for branch in row.branches),
        packs=tuple(packs),
        reference_bits=None if reference is None else reference.logprobs(rows, width).view(torch.int32),
        weight_bits=_bits([row.weight for row in rows]) if _weighted(rows) else None,
        graded_bits=_bits([graded(row) for row in rows]) if len(rows[0].branches) - mismatched == 2 else None,
        pad=pad,
        padded=None if packs else pad(),
    )


def step_size(rows: Sequence[Row], members: np.ndarray | Mapping[int, int] | None = None) -> StepSize:
    """The size of an optimizer step.

    Args:
        rows: all rows of the step.
        members: the size of each group in the whole data set; None: these rows are the data set.
    """
    weights = tuple(row.weight for row in rows)
    tokens = zip(*([row.weight * count for count in _scored_counts(row)] for row in rows), strict=True)
    size = StepSize(math.fsum(weights), tuple(map(math.fsum, tokens)))
    if rows[0].score is not None:
        # Advantages are whitened over the step and compared within groups, which needs the scores of all ranks.
        members = group_sizes(rows) if members is None else members
        size.groups = tuple(row.group for row in rows)
        size.scores = _scores(rows)
        size.members = tuple(int(members[group]) for group in size.groups)
        size.weights = weights if _weighted(rows) else ()
    return size


def _scored_counts(row: Row) -> list[int]:
    return [len(row.scored(branch)) for branch in range(len(row.branches))]


def _scores(rows: Sequence[Row]) -> tuple[float, ...]:
    return tuple(float(row.score or 0.0) for row in rows)


def _bits(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(torch.int32)


def _weighted(rows: Sequence[Row]) -> bool:
    return any(row.weight != 1 for row in rows)


def _floats(bits: Tensor | None) -> Tensor | None:
    return None if bits is None else bits.view(torch.float32)


def _padded(rows: Sequence[Row], width: int, count: int, *, mismatched: bool, whole: bool) -> tuple[Chunk, ...]:
    chunks: list[Chunk] = []
    branches = range(len(rows[0].branches))
    trained = len(branches) - mismatched
    # Trained and mismatched sequences are in separate chunks, so that the latter run without a gradient.
    for own, needs_grad in ((branches[:trained], True), (branches[trained:], False)):
        places = [(b, k) for b in range(len(rows)) for k in own]
        places.sort(key=lambda place: len(rows[place[0]].prompt) + len(rows[place[0]].branches[place[1]]))
        # The sizes of chunks differ by one at most. With fewer sequences than chunks, each sequence is a chunk of its
        # own.
        edges = sorted({len(places) * number // count for number in range(count + 1)})
        chunks += [_chunk(rows, places[a:z], width, needs_grad=needs_grad, whole=whole) for a, z in pairwise(edges)]
    return tuple(chunks)


def _chunk(
    rows: Sequence[Row], places: Sequence[tuple[int, int]], width: int, *, needs_grad: bool, whole: bool
) -> Chunk:
    # The last token of a sequence predicts nothing, so it is not fed unless its state is needed.
    lengths = [len(rows[b].prompt) + len(rows[b].branches[k]) - 1 for b, k in places]
    scored = [rows[b].scored(k) for b, k in places]
    longest = max(lengths) + whole
    input_ids = torch.full((len(places), longest), PAD, dtype=torch.long)
    predicts: list[int] = []
    targets: list[int] = []
    slots: list[int] = []
    for n, (b, k) in enumerate(places):
        prompt, branch = rows[b].prompt, rows[b].branches[k]
        input_ids[n, : lengths[n] + whole] = torch.tensor((prompt + branch)[: lengths[n] + whole])
        # The state of the prompt's last token predicts the branch's first one.
        predicts += [n * longest + len(prompt) - 1 + place for place in scored[n]]
        slot = (b * len(rows[b].branches) + k) * width
        targets += [branch[place] for place in scored[n]]
        slots += range(slot, slot + len(scored[n]))
    chunk = Chunk(input_ids, torch.tensor(predicts), torch.tensor(targets), torch.tensor(slots), needs_grad)
    if whole:
        # Lengths count one token less than is fed, so they are also the places of the last tokens.
        chunk.last = torch.arange(len(places)) * longest + torch.tensor(lengths)
        chunk.owners = torch.tensor([b * len(rows[b].branches) + k for b, k in places])
    return chunk


class Batches(Dataset[Batch]):
    """Collates the rows of a micro-batch; used with ``DataLoader(batch_size=None)``.

    Args:
        rows: all rows of the data set.
        collate_rows: :func:`collate`, with its options bound.
    """

    def __init__(self, rows: Sequence[Row], collate_rows: Callable[..., Batch] = collate) -> None:
        self.rows, self.collate_rows = rows, collate_rows
        self._members = group_sizes(rows)
        self._step: tuple[int, ...] = ()

    def __getitem__(self, micro: MicroBatch) -> Batch:
        # The micro-batches of a step follow each other, so remembering one step saves reading its rows again.
        if micro.step != self._step:
            self._step, self._size = micro.step, step_size([self.rows[i] for i in micro.step], self._members)
        return self.collate_rows([self.rows[i] for i in micro.rows], step=self._size)
