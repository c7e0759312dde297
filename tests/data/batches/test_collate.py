"""Batches: where each token goes, and which rows make up each step on each rank."""

import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision

from halos.data.batches.batch import StepSize
from halos.data.batches.collate import PAD, Batches, collate, step_size
from halos.data.batches.order import MicroBatch
from halos.data.rows.token_rows import Row
from tests import tiny

A = Row("a", 3, (5, 6, 7), ((8, 9), (10,)), desirable=True, score=0.1)
B = Row("b", 4, (11,), ((12, 13, 14), (15, 16)), desirable=False, score=-2.0)


# Collation


def test_collation_by_hand() -> None:
    batch = collate([A, B], chunks=2)
    assert batch.ids == ("a", "b")
    assert len(batch) == 2
    assert batch.mask.tolist() == [[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]]]
    assert batch.group.tolist() == [3, 4]
    assert batch.desirable.tolist() == [True, False]
    assert batch.scores == (0.1, -2.0)
    assert batch.total_tokens == (3 + 2) + (3 + 1) + (1 + 3) + (1 + 2)
    short, long = batch.chunks
    # The last token of each sequence predicts nothing and is not fed.
    assert short.input_ids.tolist() == [[11, 15, PAD], [5, 6, 7]]
    assert short.predicts.tolist() == [0, 1, 5]
    assert short.targets.tolist() == [15, 16, 10]
    assert short.slots.tolist() == [9, 10, 3]
    assert long.input_ids.tolist() == [[11, 12, 13, PAD], [5, 6, 7, 8]]
    assert long.predicts.tolist() == [0, 1, 2, 6, 7]
    assert long.targets.tolist() == [12, 13, 14, 8, 9]
    assert long.slots.tolist() == [6, 7, 8, 0, 1]
    assert short.needs_grad
    assert long.needs_grad


def test_mismatched_completions_have_chunks_of_their_own() -> None:
    batch = collate([A, B], mismatched=True, chunks=1)
    trained, mismatched = batch.chunks
    assert trained.needs_grad
    assert trained.targets.tolist() == [12, 13, 14, 8, 9]
    assert not mismatched.needs_grad
    assert mismatched.targets.tolist() == [15, 16, 10]
    assert mismatched.slots.tolist() == [9, 10, 3]


def test_turns_of_others_in_a_completion_are_fed_and_have_no_place() -> None:
    row = Row("a", 0, (5, 6), ((8, 9, 10, 11, 12), (13,)), weight=2.0, context=(((1, 3),), ()))
    cut = Row("b", 1, (7,), ((14, 15, 16), (17, 18)), context=(((1, 9),), ()))  # the limit is in the user's turn
    batch = collate([row, cut], packing=True)
    assert batch.mask.tolist() == [[[1, 1, 1], [1, 0, 0]], [[1, 0, 0], [1, 1, 0]]]
    assert batch.step == StepSize(3.0, (2.0 * 3 + 1, 2.0 * 1 + 2))
    (chunk,) = batch.chunks
    at = chunk.input_ids.tolist().index([5, 6, 8, 9, 10, 11])
    row_places = chunk.predicts - at * chunk.input_ids.shape[1]
    assert [place for place in row_places.tolist() if 0 <= place < chunk.input_ids.shape[1]] == [1, 4, 5]
    assert sorted(zip(chunk.slots.tolist(), chunk.targets.tolist(), strict=True)) == [
        *((0, 8), (1, 11), (2, 12), (3, 13)),
        *((6, 14), (9, 17), (10, 18)),
    ]
    (part,) = batch.packs
    assert part.input_ids.tolist() == [5, 6, 8, 9, 10, 11, 7, 17]  # nothing that no scored token follows
    assert part.predicts.tolist() == [1, 4, 5, 1, 6, 6, 7]
    assert part.targets.tolist() == [8, 11, 12, 13, 14, 17, 18]


def test_views_without_labels_or_scores_have_none() -> None:
    batch = collate([Row("a", 0, (1,), ((2,),)), Row("b", 1, (1,), ((3,),))])
    assert batch.desirable is None
    assert batch.scores is None


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("mismatched", [False, True])
def test_every_scored_token_has_one_slot_whatever_the_number_of_chunks(chunks: int, mismatched: bool) -> None:
    rows = tiny.rows(7, branches=2, seed=chunks)
    batch = collate(rows, mismatched=mismatched, chunks=chunks)
    grid = torch.full((batch.mask.numel(),), -1)
    for chunk in batch.chunks:
        assert len(set(chunk.predicts.tolist())) == len(chunk.targets) == len(chunk.slots)
        assert (grid[chunk.slots] == -1).all(), "no slot twice"
        grid[chunk.slots] = chunk.targets
    grid = grid.view(batch.mask.shape)
    assert torch.equal(grid >= 0, batch.mask)
    for b, row in enumerate(rows):
        for k, branch in enumerate(row.branches):
            assert grid[b, k, : len(branch)].tolist() == list(branch)
    kinds = [7, 7] if mismatched else [14]
    assert len(batch.chunks) == sum(min(chunks, places) for places in kinds)


def test_a_scored_token_is_predicted_where_the_one_before_it_stands() -> None:
    rows = tiny.rows(6, branches=2, seed=1)
    (chunk,) = collate(rows).chunks
    sequences = {(row.prompt + branch)[:-1] for row in rows for branch in row.branches}
    length = chunk.input_ids.shape[1]
    for n, ids in enumerate(chunk.input_ids):
        end = max(place - n * length for place in chunk.predicts.tolist() if place // length == n) + 1
        assert tuple(ids[:end].tolist()) in sequences
        assert (ids[end:] == PAD).all()


def test_length_groups_leave_less_padding() -> None:
    rows = tiny.rows(16, seed=2)
    fed = [sum(chunk.input_ids.numel() for chunk in collate(rows, chunks=chunks).chunks) for chunks in (1, 4, 16)]
    assert fed[0] > fed[1] > fed[2] == sum(len(row.prompt) + len(row.branches[0]) - 1 for row in rows)


def test_step_size_counts_examples_and_the_tokens_of_each_branch() -> None:
    bare = [replace(row, score=None) for row in (A, B)]
    assert step_size(bare) == StepSize(2, (5, 3))
    assert collate(bare).step == StepSize(2, (5, 3))
    assert collate([A], step=StepSize(8, (40, 30))).step == StepSize(8, (40, 30))


def test_a_batch_knows_the_size_of_its_whole_step() -> None:
    batches = Batches([A, B, Row("c", 0, (1,), ((2,), (3, 4)))], partial(collate, chunks=2))
    batch = batches[MicroBatch((1,), (0, 1, 2))]
    assert batch.ids == ("b",)
    assert (batch.step.examples, batch.step.tokens) == (3, (6, 5))


def test_a_step_of_scored_examples_lists_groups_scores_and_how_many_examples_a_group_has() -> None:
    assert step_size([A, B]) == StepSize(2, (5, 3), groups=(3, 4), scores=(0.1, -2.0), members=(1, 1))
    batches = Batches([A, B, replace(A, id="c", score=5.0)])
    assert batches[MicroBatch((1,), (0, 1))].step == StepSize(2, (5, 3), (3, 4), (0.1, -2.0), (2, 1))


def test_completions_fed_whole_have_their_last_token_and_where_it_is() -> None:
    short, long = collate([A, B], chunks=2, last_hidden=True).chunks
    assert short.input_ids.tolist() == [[11, 15, 16, PAD], [5, 6, 7, 10]]
    assert short.predicts.tolist() == [0, 1, 6]
    assert short.last.tolist() == [2, 7]
    assert short.owners.tolist() == [3, 1]
    assert long.input_ids.tolist() == [[11, 12, 13, 14, PAD], [5, 6, 7, 8, 9]]
    assert long.last.tolist() == [3, 9]
    assert long.owners.tolist() == [2, 0]
    plain = collate([A, B], chunks=2).chunks
    for whole, part in zip((short, long), plain, strict=True):
        assert (whole.targets.tolist(), whole.slots.tolist()) == (part.targets.tolist(), part.slots.tolist())
        assert part.last is part.owners is None


def tensors(batch: Any) -> list[torch.Tensor]:
    inside = [t for c in batch.chunks for t in (c.input_ids, c.predicts, c.targets, c.slots, c.last, c.owners)]
    inside += [t for p in batch.packs for t in (p.input_ids, p.tree, p.predicts, p.targets, p.sources, p.slots)]
    return [*inside, batch.mask, batch.group, batch.desirable]


def test_moving_gives_a_copy_and_leaves_the_original() -> None:
    batch = collate([A, B], mismatched=True, last_hidden=True, packing=True)
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
    assert {tensor.device.type for tensor in tensors(batch)} == {"cpu"}
    assert moved is not batch
    assert (moved.ids, moved.scores, moved.step, moved.total_tokens) == (
        batch.ids,
        batch.scores,
        batch.step,
        batch.total_tokens,
    )
    assert [chunk.needs_grad for chunk in moved.chunks] == [True, False]


def test_moving_a_batch_without_labels() -> None:
    assert collate([Row("a", 0, (1,), ((2,),))]).to("meta").desirable is None


@pytest.mark.parametrize("mismatched", [False, True])
def test_beside_packs_padded_chunks_are_made_when_they_are_asked_for(mismatched: bool) -> None:
    options: dict[str, Any] = {"mismatched": mismatched, "chunks": 2}
    at_once = collate([A, B], **options)
    assert at_once.made_chunks is not None
    batch = pickle.loads(pickle.dumps(collate([A, B], packing=True, **options)))  # as from a worker
    through_plugin = HalfPrecision("bf16-true").convert_input(batch)
    assert through_plugin.to("meta").chunks[0].input_ids.device.type == "meta"
    assert through_plugin.made_chunks is None
    for mine, other in zip(through_plugin.chunks, at_once.chunks, strict=True):
        assert torch.equal(mine.input_ids, other.input_ids)
        assert torch.equal(mine.predicts, other.predicts)
        assert (mine.targets.tolist(), mine.slots.tolist()) == (other.targets.tolist(), other.slots.tolist())
        assert mine.needs_grad == other.needs_grad
    assert through_plugin.chunks is through_plugin.made_chunks


def test_a_step_is_counted_once_for_all_its_micro_batches() -> None:
    rows = tiny.rows(6, branches=2)
    taken: list[int] = []

    class Watched(list[Row]):
        def __getitem__(self, index: Any) -> Any:
            taken.append(index)
            return super().__getitem__(index)

    batches = Batches(Watched(rows))
    taken.clear()
    found = [batches[MicroBatch((n,), step)] for step in ((0, 1, 2), (3, 4, 5)) for n in step]
    assert len(taken) == 6 + 6
    assert [batch.step for batch in found] == 3 * [step_size(rows[:3])] + 3 * [step_size(rows[3:])]
