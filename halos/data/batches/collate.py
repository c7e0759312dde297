"""Rows → tensors.

A batch holds B examples with K branches each. Its sequences (prompt + branch, right-padded) are sorted by length and
split into chunks, so that little of a chunk is padding; where each scored token belongs in the [B, K, C] grid of
completion tokens is recorded by position, never found again from token values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from halos.data.batches.order import MicroBatch
from halos.data.batches.packing import Pack, divide, map_tensors, pack
from halos.data.batches.reference_table import ReferenceTable
from halos.data.rows.token_rows import Row, group_sizes

PAD = 0
"""Any id does: attention is causal and padding is on the right, so no scored token ever sees it."""


@dataclass(slots=True)
class Chunk:
    """n sequences of similar length, padded to T tokens, with M scored tokens.

    ``input_ids`` [n, T]; ``predicts`` [n, T], true where the *next* token is scored; ``targets`` [M], those tokens, in
    the order in which ``predicts`` lists them; ``slots`` [M], their places in the flattened [B, K, C] grid.
    ``needs_grad`` is false for chunks that the loss only reads, such as KTO's mismatched completions. Only where
    completions are fed whole: ``last`` [n, T], true at each completion's last token, and ``owners`` [n], the places of
    the completions in the flattened [B, K] grid.
    """

    input_ids: Tensor
    predicts: Tensor
    targets: Tensor
    slots: Tensor
    needs_grad: bool = True
    last: Any = None
    owners: Any = None


@dataclass(slots=True)  # not frozen: Lightning's precision plugins rebuild every dataclass that they find in a batch
class StepSize:
    """Examples, and scored tokens of each branch, in the whole optimizer step: all ranks, all micro-batches.

    Where examples have scores, ``groups`` and ``scores`` list those of all, and ``members`` how many examples the
    whole data set has in each one's group.
    """

    examples: int
    tokens: tuple[int, ...]
    groups: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    members: tuple[int, ...] = ()


@dataclass(slots=True)
class Batch:
    """One rank's examples of one micro-batch.

    ``mask`` [B, K, C] is true where branch k of example b has a token. Examples of one prompt share a number in
    ``group`` [B]. ``packs``, where there are any, hold the same tokens as ``chunks``, for models that can read them
    packed, each behind the one that it continues; ``pad()`` then makes the chunks, and ``padded`` holds them once they
    are made. ``desirable`` is a bool tensor [B], or None for views without labels; ``scores`` stays plain Python, so
    that no precision plugin rounds a reward to bf16; for the same reason ``reference_bits`` are float32 numbers seen
    as int32.
    """

    ids: tuple[str, ...]
    mask: Tensor
    group: Tensor
    step: StepSize
    desirable: Any = None
    scores: tuple[float, ...] | None = None
    total_tokens: int = 0
    packs: tuple[Pack, ...] = ()
    reference_bits: Any = None
    pad: Any = tuple
    padded: tuple[Chunk, ...] | None = None

    @property
    def reference(self) -> Tensor | None:
        """log π_ref of each completion token in float32, [B, K, C], where it was computed beforehand."""
        bits: Tensor | None = self.reference_bits
        return None if bits is None else bits.view(torch.float32)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The batch's sequences with padding; beside packs they are made only when something asks for them."""
        if self.padded is None:
            move = partial(Tensor.to, device=self.mask.device)
            self.padded = tuple(map_tensors(chunk, move) for chunk in self.pad())
        return self.padded

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """A copy on the device."""
        return self._map(partial(Tensor.to, device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """A copy in pinned memory (called by the data loader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        made = map_tensors(self, function)
        made.packs = tuple(map_tensors(part, function) for part in self.packs)
        if self.padded is not None:
            made.padded = tuple(map_tensors(chunk, function) for chunk in self.padded)
        return made


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
    """Tensors for the rows of one micro-batch.

    ``mismatched`` says that the last branch is KTO's y', which needs no gradient. ``chunks`` is the number of
    length-sorted parts (for each of the two kinds): a constant, so that all ranks run equally many forwards.
    ``whole`` feeds each completion's last token too, for objectives that read its state; it rules packing out.
    ``packing`` adds the same tokens as packs, in which branches of one prompt share it if ``share_prompts``, and of
    which there are as many as it takes for none to have more than ``max_tokens`` tokens.
    ``reference`` gives the batch the reference's log-probs.
    """
    width = max(len(branch) for row in rows for branch in row.branches)
    branches = len(rows[0].branches)
    mask = torch.zeros(len(rows), branches, width, dtype=torch.bool)
    for b, row in enumerate(rows):
        for k, branch in enumerate(row.branches):
            mask[b, k, : len(branch)] = True
    packed = packing and not whole  # packs leave out each completion's last token
    pad = partial(_padded, tuple(rows), width, chunks, mismatched=mismatched, whole=whole)
    parts = divide(rows, max_tokens, share_prompts=share_prompts) if max_tokens else [slice(0, len(rows))]
    options: dict[str, Any] = {"width": width, "mismatched": mismatched, "share_prompts": share_prompts}
    return Batch(
        ids=tuple(row.id for row in rows),
        mask=mask,
        group=torch.tensor([row.group for row in rows]),
        step=step or step_size(rows),
        desirable=_column([row.desirable for row in rows]),
        scores=None if rows[0].score is None else tuple(float(row.score or 0.0) for row in rows),
        total_tokens=sum(len(row.prompt) + len(branch) for row in rows for branch in row.branches),
        packs=tuple(p for part in parts for p in pack(rows[part], start=part.start, **options)) if packed else (),
        reference_bits=None if reference is None else reference.logprobs(rows, width).view(torch.int32),
        pad=pad,
        padded=None if packed else pad(),
    )


def step_size(rows: Sequence[Row], members: np.ndarray | Mapping[int, int] | None = None) -> StepSize:
    """The denominators of a step made of these rows; ``members``: how many examples each group has, if not these."""
    branches = zip(*(row.branches for row in rows), strict=True)
    size = StepSize(len(rows), tuple(sum(map(len, branch)) for branch in branches))
    if rows[0].score is not None:
        members = group_sizes(rows) if members is None else members
        size.groups = tuple(row.group for row in rows)
        size.scores = tuple(float(row.score or 0.0) for row in rows)
        size.members = tuple(int(members[group]) for group in size.groups)
    return size


def _column(values: list[bool | None]) -> Tensor | None:
    return None if values[0] is None else torch.tensor([bool(value) for value in values])


def _padded(rows: Sequence[Row], width: int, parts: int, *, mismatched: bool, whole: bool) -> tuple[Chunk, ...]:
    trained = len(rows[0].branches) - mismatched
    made = _chunks(rows, range(trained), width, parts, needs_grad=True, whole=whole)
    if mismatched:
        made += _chunks(rows, [trained], width, parts, needs_grad=False, whole=whole)
    return tuple(made)


def _chunks(
    rows: Sequence[Row], kept: Sequence[int], width: int, parts: int, *, needs_grad: bool, whole: bool
) -> list[Chunk]:
    places = [(b, k) for b in range(len(rows)) for k in kept]
    places.sort(key=lambda place: len(rows[place[0]].prompt) + len(rows[place[0]].branches[place[1]]))
    parts = min(parts, len(places))
    edges = [len(places) * part // parts for part in range(parts + 1)]
    return [_chunk(rows, places[a:z], width, needs_grad=needs_grad, whole=whole) for a, z in pairwise(edges)]


def _chunk(
    rows: Sequence[Row], places: Sequence[tuple[int, int]], width: int, *, needs_grad: bool, whole: bool
) -> Chunk:
    # The last token of a sequence predicts nothing, so it is not fed unless its state is asked for.
    lengths = [len(rows[b].prompt) + len(rows[b].branches[k]) - 1 for b, k in places]
    input_ids = torch.full((len(places), max(lengths) + whole), PAD, dtype=torch.long)
    predicts = torch.zeros_like(input_ids, dtype=torch.bool)
    targets: list[int] = []
    slots: list[int] = []
    for n, (b, k) in enumerate(places):
        prompt, branch = rows[b].prompt, rows[b].branches[k]
        input_ids[n, : lengths[n] + whole] = torch.tensor((prompt + branch)[: lengths[n] + whole])
        predicts[n, len(prompt) - 1 : lengths[n]] = True
        start = (b * len(rows[b].branches) + k) * width
        targets += branch
        slots += range(start, start + len(branch))
    chunk = Chunk(input_ids, predicts, torch.tensor(targets), torch.tensor(slots), needs_grad)
    if whole:
        chunk.last = torch.arange(input_ids.shape[1]) == torch.tensor(lengths)[:, None]
        chunk.owners = torch.tensor([b * len(rows[b].branches) + k for b, k in places])
    return chunk


class Batches(Dataset[Batch]):
    """Collates the rows that a micro-batch names; to be used with ``DataLoader(batch_size=None)``."""

    def __init__(self, rows: Sequence[Row], *, mismatched: bool, chunks: int, **options: Any) -> None:
        self.rows, self.mismatched, self.chunks, self.options = rows, mismatched, chunks, options
        self._members = group_sizes(rows)
        self._last: tuple[tuple[int, ...], StepSize] | None = None

    def _size(self, step: tuple[int, ...]) -> StepSize:
        # The micro-batches of a step follow each other.
        if self._last is None or self._last[0] != step:
            self._last = step, step_size([self.rows[i] for i in step], self._members)
        return self._last[1]

    def __getitem__(self, micro: MicroBatch) -> Batch:
        return collate(
            [self.rows[i] for i in micro.rows],
            step=self._size(micro.step),
            mismatched=self.mismatched,
            chunks=self.chunks,
            **self.options,
        )
