"""Batches: where each token goes, and which rows make up each step on each rank."""

import math
import pickle
from dataclasses import replace
from itertools import groupby, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch.utils.data import DataLoader

from halos.data.batches import PAD, Batches, MicroBatch, StepSize, TrainingOrder, collate, step_size, validation_order
from halos.data.module import PreferenceDataModule
from halos.data.rows import Row, Rows
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
    assert short.predicts.tolist() == [[1, 1, 0], [0, 0, 1]]
    assert short.targets.tolist() == [15, 16, 10]
    assert short.slots.tolist() == [9, 10, 3]
    assert long.input_ids.tolist() == [[11, 12, 13, PAD], [5, 6, 7, 8]]
    assert long.predicts.tolist() == [[1, 1, 1, 0], [0, 0, 1, 1]]
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
        assert int(chunk.predicts.sum()) == len(chunk.targets) == len(chunk.slots)
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
    for ids, predicts in zip(chunk.input_ids, chunk.predicts, strict=True):
        end = int(predicts.nonzero().max()) + 1
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
    batches = Batches([A, B, Row("c", 0, (1,), ((2,), (3, 4)))], mismatched=False, chunks=2)
    batch = batches[MicroBatch((1,), (0, 1, 2))]
    assert batch.ids == ("b",)
    assert (batch.step.examples, batch.step.tokens) == (3, (6, 5))


def test_a_step_of_scored_examples_lists_groups_scores_and_how_many_examples_a_group_has() -> None:
    assert step_size([A, B]) == StepSize(2, (5, 3), groups=(3, 4), scores=(0.1, -2.0), members=(1, 1))
    batches = Batches([A, B, replace(A, id="c", score=5.0)], mismatched=False, chunks=1)
    assert batches[MicroBatch((1,), (0, 1))].step == StepSize(2, (5, 3), (3, 4), (0.1, -2.0), (2, 1))


def test_completions_fed_whole_have_their_last_token_and_where_it_is() -> None:
    short, long = collate([A, B], chunks=2, whole=True).chunks
    assert short.input_ids.tolist() == [[11, 15, 16, PAD], [5, 6, 7, 10]]
    assert short.predicts.tolist() == [[1, 1, 0, 0], [0, 0, 1, 0]]
    assert short.last.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    assert short.owners.tolist() == [3, 1]
    assert long.input_ids.tolist() == [[11, 12, 13, 14, PAD], [5, 6, 7, 8, 9]]
    assert long.last.tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
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
    batch = collate([A, B], mismatched=True, whole=True, packing=True)
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
    options = {"mismatched": mismatched, "chunks": 2}
    at_once = collate([A, B], **options)
    assert at_once.padded is not None
    batch = pickle.loads(pickle.dumps(collate([A, B], packing=True, **options)))  # as from a worker
    through_plugin = HalfPrecision("bf16-true").convert_input(batch)
    assert through_plugin.to("meta").chunks[0].input_ids.device.type == "meta"
    assert through_plugin.padded is None
    for mine, other in zip(through_plugin.chunks, at_once.chunks, strict=True):
        assert torch.equal(mine.input_ids, other.input_ids)
        assert torch.equal(mine.predicts, other.predicts)
        assert (mine.targets.tolist(), mine.slots.tolist()) == (other.targets.tolist(), other.slots.tolist())
        assert mine.needs_grad == other.needs_grad
    assert through_plugin.chunks is through_plugin.padded


# The order of training


def order(
    size: int, *, batch_size: int = 2, accumulate: int = 1, world_size: int = 1, rank: int = 0, **more: Any
) -> Any:
    return TrainingOrder(
        size,
        batch_size=batch_size,
        accumulate=accumulate,
        world_size=world_size,
        rank=rank,
        **{"steps": 6, "seed": 0, **more},
    )


SIZES = [12, 13, 31, 3, 1]


def stream(order: TrainingOrder) -> list[int]:
    return [i for micro in order for i in micro.rows]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_out_what_one_device_would_see(size: int, accumulate: int, world: int) -> None:
    alone = list(order(size, batch_size=2 * world, accumulate=accumulate))
    ranks = [list(order(size, accumulate=accumulate, world_size=world, rank=rank)) for rank in range(world)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert tuple(i for part in parts for i in part.rows) == whole.rows
        assert {part.step for part in parts} == {whole.step}


@pytest.mark.parametrize("size", SIZES)
def test_accumulation_shares_out_what_one_large_batch_would_hold(size: int) -> None:
    large = list(order(size, batch_size=6))
    small = list(order(size, batch_size=2, accumulate=3))
    assert len(small) == 3 * len(large)
    for n, whole in enumerate(large):
        parts = small[3 * n : 3 * n + 3]
        assert tuple(i for part in parts for i in part.rows) == whole.rows == whole.step
        assert {part.step for part in parts} == {whole.step}


@pytest.mark.parametrize("size", SIZES)
def test_each_epoch_of_the_stream_holds_every_example_once(size: int) -> None:
    seen = stream(order(size, steps=math.ceil(3 * size / 2)))
    for epoch in range(3):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


@pytest.mark.parametrize("size", SIZES)
def test_every_step_has_the_same_size(size: int) -> None:
    assert {len(micro.step) for micro in order(size, batch_size=4, accumulate=2)} == {8}


def test_epochs_are_shuffled_anew() -> None:
    seen = stream(order(30, steps=45))
    assert len({tuple(seen[start : start + 30]) for start in (0, 30, 60)}) == 3
    assert seen[:30] != list(range(30))


def test_seeds_give_different_orders_and_one_seed_always_the_same() -> None:
    assert stream(order(30, seed=1)) == stream(order(30, seed=1))
    assert len({tuple(stream(order(30, seed=seed))) for seed in range(10)}) == 10


def test_the_second_epoch_of_one_seed_is_not_the_first_of_the_next() -> None:
    second = stream(order(30, seed=0, steps=30))[30:]
    assert second != stream(order(30, seed=1, steps=15))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("start", [0, 1, 5, 7, 17, 18])
def test_a_resumed_order_goes_on_where_it_was(size: int, start: int) -> None:
    whole = list(order(size, batch_size=2, accumulate=3))
    resumed = order(size, batch_size=2, accumulate=3)
    resumed.start = start
    assert list(resumed) == whole[start:]
    assert len(resumed) == len(whole), "Lightning counts micro-batches from the start of the run"


def test_an_order_can_be_walked_twice() -> None:
    made = order(7, batch_size=3, accumulate=2)
    assert list(made) == list(made)


def test_a_data_set_smaller_than_a_step_is_repeated() -> None:
    (micro,) = order(3, batch_size=8, steps=1)
    assert sorted(micro.rows[:3]) == sorted(micro.rows[3:6]) == [0, 1, 2]
    assert len(micro.rows) == 8


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loader_collates_what_the_order_names(accumulate: int) -> None:
    rows = tiny.rows(5)
    made = order(5, accumulate=accumulate)
    loader: Any = DataLoader(Batches(rows, mismatched=False, chunks=2), sampler=made, batch_size=None)
    batches = list(loader)
    assert [batch.ids for batch in batches] == [tuple(rows[i].id for i in micro.rows) for micro in made]
    assert {batch.step.examples for batch in batches} == {2 * accumulate}


GROUPS = [4, 4, 7, 1, 7, 4, 1, 2, 7, 9, 9, 4]


@pytest.mark.parametrize("seed", range(5))
def test_an_order_with_groups_shuffles_whole_groups(seed: int) -> None:
    seen = stream(order(12, steps=18, groups=GROUPS, seed=seed))
    epochs = [seen[start : start + 12] for start in (0, 12, 24)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
        runs = [group for group, _ in groupby(GROUPS[i] for i in epoch)]
        assert sorted(runs) == [1, 2, 4, 7, 9], "no group in two pieces"
    assert len(set(map(tuple, epochs))) == 3


def test_ranks_share_out_groups_as_one_device_would_see_them() -> None:
    alone = list(order(12, batch_size=4, accumulate=2, groups=GROUPS))
    ranks = [list(order(12, accumulate=2, world_size=2, rank=rank, groups=GROUPS)) for rank in (0, 1)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert tuple(i for part in parts for i in part.rows) == whole.rows
        assert {part.step for part in parts} == {whole.step}


# The order of validation

CASES = [case for case in product((1, 2, 5, 8, 17, 40), (1, 2, 4, 16), (1, 2, 3, 5)) if case[0] >= case[2]]


@pytest.mark.parametrize(("size", "batch_size", "world"), CASES)
def test_validation_sees_every_example_once(size: int, batch_size: int, world: int) -> None:
    ranks = [validation_order(size, batch_size=batch_size, world_size=world, rank=rank) for rank in range(world)]
    assert len({len(micros) for micros in ranks}) == 1, "ranks that run unequally many batches would wait forever"
    seen = [i for micros in zip(*ranks, strict=True) for micro in micros for i in micro.rows]
    assert seen == list(range(size))
    for micros in zip(*ranks, strict=True):
        assert len({micro.step for micro in micros}) == 1
        assert tuple(i for micro in micros for i in micro.rows) == micros[0].step
    sizes = [len(micro.rows) for micros in ranks for micro in micros]
    assert min(sizes) >= (batch_size if size >= batch_size * world else 1)
    assert max(sizes) <= 2 * batch_size


def test_validation_needs_an_example_for_each_device() -> None:
    with pytest.raises(ValueError, match="each of 4 devices, found 3"):
        validation_order(3, batch_size=2, world_size=4, rank=0)


@pytest.mark.parametrize(("size", "batch_size"), [(3, 1), (7, 2), (3, 8)])
def test_validation_runs_equally_many_forwards_on_every_rank(size: int, batch_size: int) -> None:
    # Sharded strategies gather weights in each forward: one more on one rank hangs them all.
    def forwards(rank: int) -> list[int]:
        data = PreferenceDataModule(None, batch_size=batch_size)  # type: ignore[arg-type]
        data.rows["val"] = Rows(tiny.rows(size))
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)  # type: ignore[assignment]
        return [len(batch.chunks) for batch in data.val_dataloader()]

    assert forwards(0) == forwards(1)
