"""Collates token rows to the tensors of a micro-batch.

A batch has B examples with K branches (completions) each. Every sequence is a prompt followed by one branch. Each
scored token has a place in a grid [B, K, C], where C is the largest number of scored tokens in a branch. Completion
tokens that are not scored, such as a user turn between two assistant turns, are fed to the model but have no place:

    rows → places (b, k) sorted by length → chunks, each padded on the right to its own longest sequence
                                          → scored tokens → slots in the flattened grid

Sorting keeps padding small. It changes the order of sequences, so each log-prob has a *slot*, its place in the grid.
Slots are computed from positions when a row is written, never from token values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from halos.data.batches.batch import Batch, Chunk, StepSize
from halos.data.batches.order import MicroBatch
from halos.data.batches.packing import Pack, divided_places, pack
from halos.data.batches.parts import divide
from halos.data.batches.reference_table import ReferenceTable
from halos.data.rows.joint_rows import by_view, places as places_in, sizes_by_view
from halos.data.rows.token_rows import Row, graded, group_sizes

PAD = 0
"""The id of padding. All would do: attention is causal and padding on the right, so no scored token attends to it."""

Members = np.ndarray | Mapping[int, int]
"""The size of each group in the whole data set."""


def collate(
    rows: Sequence[Row],
    *,
    step: StepSize | None = None,
    mismatched: bool = False,
    chunks: int = 1,
    last_hidden: bool = False,
    packing: bool = False,
    share_prompts: bool = True,
    max_tokens: int | None = None,
    reference: ReferenceTable | None = None,
) -> Batch:
    """Collate the rows of one micro-batch.

    Args:
        rows: B rows with K branches each, or records of several views with up to K completions.
        step: the size of the optimizer step; None: these rows are the step.
        mismatched: the last branch is KTO's y', which needs no gradient. (Records of several views have this in their
            views.)
        chunks: the number of length-sorted chunks into which the trained and the mismatched sequences are each divided.
            It is a constant, so that all ranks run equally many forwards.
        last_hidden: also feed each completion's last token, for objectives that read its state. Excludes ``packing``.
        packing: add the same tokens as packs.
        share_prompts: in a pack, branches of one prompt share it.
        max_tokens: the maximum number of tokens in a pack; larger batches are divided into several packs. None: no
            maximum.
        reference: the table of the reference's log-probs, if they were computed before training.
    """
    step = step or step_size(rows)
    branches = max(len(row.branches) for row in rows)
    width = max(max(_scored_counts(row)) for row in rows)
    records = rows[0].views
    batch = _described(
        rows,
        step,
        shape=(branches, width),
        labelled=not records and rows[0].desirable is not None,
        scored=not records and rows[0].score is not None,
        pairs=not records and branches - mismatched == 2,
    )
    batch.views = tuple(_of_view(rows, number, step, (branches, width)) for number in range(len(records)))
    batch.total_tokens = sum(
        len(row.prompt) + len(branch) for view in by_view(rows) for row in view for branch in row.branches
    )
    mismatched |= any(view.mismatched for view in records)
    packs: list[Pack] = []
    if packing and not last_hidden:  # packs leave out each completion's last token
        grid = {"width": width, "branches": branches}
        for part in divide(rows, max_tokens, share_prompts=share_prompts):
            packs += pack(rows[part], mismatched=mismatched, share_prompts=share_prompts, start=part.start, **grid)
    batch.packs = tuple(packs)
    if reference is not None:
        batch.reference_bits = reference.logprobs(rows, width).view(torch.int32)
    # With packs, padded tensors would waste memory, so they are made only if they are read.
    batch.make_chunks = partial(
        _padded, tuple(rows), (branches, width), chunks, mismatched=mismatched, last_hidden=last_hidden
    )
    batch.made_chunks = None if packs else batch.make_chunks()
    return batch


def step_size(rows: Sequence[Row], members: Sequence[Members | None] | None = None) -> StepSize:
    """The size of an optimizer step.

    Args:
        rows: all rows of the step.
        members: for each view of the rows, the size of each group in the whole data set; None: these rows are the whole
            data set.
    """
    views = rows[0].views
    members = [None] * (len(views) or 1) if members is None else members
    if not views:
        return _size(rows, len(rows[0].branches), members[0])
    parts = zip(by_view(rows), views, members, strict=True)
    return StepSize(len(rows), (), views=tuple(_size(of_view, view.branches, sizes) for of_view, view, sizes in parts))


def _size(rows: Sequence[Row], branches: int, members: Members | None) -> StepSize:
    weights = tuple(row.weight for row in rows)
    counts = [[row.weight * count for count in _scored_counts(row)] for row in rows]
    size = StepSize(math.fsum(weights), tuple(math.fsum(row[branch] for row in counts) for branch in range(branches)))
    if rows and rows[0].score is not None:
        # Advantages are whitened over the step and compared within groups, which needs the scores of all ranks.
        members = group_sizes(rows) if members is None else members
        size.groups = tuple(row.group for row in rows)
        size.scores = _scores(rows)
        size.members = tuple(int(members[group]) for group in size.groups)
        size.weights = weights if _weighted(rows) else ()
    return size


def _described(
    rows: Sequence[Row], step: StepSize, *, shape: tuple[int, int], labelled: bool, scored: bool, pairs: bool
) -> Batch:
    """The batch of some rows (perhaps none) without their tokens; ``shape``: K and C."""
    branches, width = shape
    counts = [_scored_counts(row) for row in rows]
    lengths = torch.tensor([row + [0] * (branches - len(row)) for row in counts], dtype=torch.long)
    return Batch(
        ids=tuple(row.id for row in rows),
        mask=torch.arange(width) < lengths.view(-1, branches, 1),
        group=torch.tensor([row.group for row in rows], dtype=torch.long),
        step=step,
        desirable=torch.tensor([bool(row.desirable) for row in rows], dtype=torch.bool) if labelled else None,
        scores=_scores(rows) if scored else None,
        weight_bits=_bits([row.weight for row in rows]) if _weighted(rows) else None,
        graded_bits=_bits([graded(row) for row in rows]).view(-1, 3) if pairs else None,
    )


def _of_view(rows: Sequence[Row], number: int, step: StepSize, grid: tuple[int, int]) -> Batch:
    """The batch of the records' examples in one view; ``grid``: K and C of the records."""
    view, (branches, width) = rows[0].views[number], grid
    # If a rank's records have no example of a view, its batch has the same tensors, for 0 examples.
    batch = _described(
        [example for row in rows for example in row.views[number].rows],
        step.views[number],
        shape=(view.branches, width),
        labelled=view.view in ("binary", "scored"),
        scored=view.view == "scored",
        pairs=view.view == "pairs",
    )
    places = [(b, branch_places) for b, row in enumerate(rows) for branch_places in places_in(row, row.views[number])]
    slots = [[b * branches + k for k in branch_places] for b, branch_places in places]
    batch.places = torch.tensor(slots, dtype=torch.long).view(-1, view.branches)
    return batch


def _scored_counts(row: Row) -> list[int]:
    return [len(row.scored(branch)) for branch in range(len(row.branches))]


def _scores(rows: Sequence[Row]) -> tuple[float, ...]:
    return tuple(float(row.score or 0.0) for row in rows)


def _bits(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(torch.int32)


def _weighted(rows: Sequence[Row]) -> bool:
    return any(row.weight != 1 for row in rows)


def _padded(
    rows: Sequence[Row], grid: tuple[int, int], count: int, *, mismatched: bool, last_hidden: bool
) -> tuple[Chunk, ...]:
    trained, others = divided_places(rows, mismatched=mismatched)
    chunks = _chunks(rows, trained, grid, count, needs_grad=True, last_hidden=last_hidden)
    if mismatched:
        # Mismatched sequences have chunks of their own, which run without a gradient. A rank's records of several views
        # may have fewer mismatched completions than there are chunks, or none, so they get one chunk.
        count = 1 if rows[0].views else count
        chunks += _chunks(rows, others, grid, count, needs_grad=False, last_hidden=last_hidden)
    return tuple(chunks)


def _chunks(
    rows: Sequence[Row],
    places: Sequence[tuple[int, int]],
    grid: tuple[int, int],
    count: int,
    *,
    needs_grad: bool,
    last_hidden: bool,
) -> list[Chunk]:
    if not places:
        # A forward must run even so: collectives of sharded models hang if one rank runs fewer than the others.
        none = torch.zeros(0, dtype=torch.long)
        ends = none if last_hidden else None
        return [Chunk(torch.full((1, 1), PAD, dtype=torch.long), none, none, none, needs_grad, last=ends, owners=ends)]
    ordered = sorted(places, key=lambda place: len(rows[place[0]].prompt) + len(rows[place[0]].branches[place[1]]))
    # The sizes of chunks differ by at most one. With fewer sequences than chunks, each sequence is a chunk of its own.
    edges = sorted({len(ordered) * number // count for number in range(count + 1)})
    return [
        _chunk(rows, ordered[a:z], grid, needs_grad=needs_grad, last_hidden=last_hidden) for a, z in pairwise(edges)
    ]


def _chunk(
    rows: Sequence[Row],
    places: Sequence[tuple[int, int]],
    grid: tuple[int, int],
    *,
    needs_grad: bool,
    last_hidden: bool,
) -> Chunk:
    branches, width = grid
    # The last token of a sequence predicts nothing, so it is not fed unless its state is needed.
    lengths = [len(rows[b].prompt) + len(rows[b].branches[k]) - 1 for b, k in places]
    scored = [rows[b].scored(k) for b, k in places]
    longest = max(lengths) + last_hidden
    input_ids = torch.full((len(places), longest), PAD, dtype=torch.long)
    predicts: list[int] = []
    targets: list[int] = []
    slots: list[int] = []
    for n, (b, k) in enumerate(places):
        prompt, branch = rows[b].prompt, rows[b].branches[k]
        input_ids[n, : lengths[n] + last_hidden] = torch.tensor((prompt + branch)[: lengths[n] + last_hidden])
        # The state of the prompt's last token predicts the branch's first one.
        predicts += [n * longest + len(prompt) - 1 + place for place in scored[n]]
        slot = (b * branches + k) * width
        targets += [branch[place] for place in scored[n]]
        slots += range(slot, slot + len(scored[n]))
    chunk = Chunk(input_ids, torch.tensor(predicts), torch.tensor(targets), torch.tensor(slots), needs_grad)
    if last_hidden:
        # ``lengths`` leaves out the last token, so it is also the place of the last token.
        chunk.last = torch.arange(len(places)) * longest + torch.tensor(lengths)
        chunk.owners = torch.tensor([b * branches + k for b, k in places])
    return chunk


class Batches(Dataset[Batch]):
    """Collates the rows of a micro-batch; used with ``DataLoader(batch_size=None)``.

    Args:
        rows: all rows of the data set.
        collate_rows: :func:`collate`, with its options bound.
    """

    def __init__(self, rows: Sequence[Row], collate_rows: Callable[..., Batch] = collate) -> None:
        self.rows, self.collate_rows = rows, collate_rows
        self._members = sizes_by_view(rows)
        self._step: tuple[int, ...] = ()

    def __getitem__(self, micro: MicroBatch) -> Batch:
        # The micro-batches of a step follow each other, so remembering its size saves reading its rows again.
        if micro.step != self._step:
            self._step, self._size = micro.step, step_size([self.rows[i] for i in micro.step], self._members)
        return self.collate_rows([self.rows[i] for i in micro.rows], step=self._size)
