"""Which examples make up each step: the same on one device and on many, every one once an epoch."""

from __future__ import annotations

import math
from itertools import groupby, pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import DataLoader

from halos.data.batches.collate import Batches
from halos.data.batches.order import Bundles, Division, TrainingOrder, validation_order
from halos.data.module import PreferenceDataModule
from halos.data.preparation.intake import Intake
from halos.data.preparation.needs import DataNeeds
from halos.data.preparation.prepare import Prepared
from halos.data.rows.tokenise import SplitRows
from tests import tiny

# The order of training


def order(size: int, *, groups: Any = None, together: int | None = None, **division: int) -> Any:
    return TrainingOrder(size, Division(**{"batch_size": 2, "steps": 6, **division}), groups=groups, together=together)


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
    loader: Any = DataLoader(Batches(rows), sampler=made, batch_size=None)
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


def test_bundles_keep_examples_of_one_group_together_up_to_a_number() -> None:
    made = Bundles(GROUPS, 2)
    found = [list(made.laid_out([n])) for n in range(len(made))]
    assert found == [[0, 1], [5, 11], [2, 4], [8], [3, 6], [7], [9, 10]]


def test_bundles_are_laid_out_in_the_order_asked_for() -> None:
    assert list(Bundles(GROUPS, 2).laid_out([6, 3, 0])) == [9, 10, 8, 0, 1]
    assert list(Bundles(GROUPS, None).laid_out([3, 1])) == [7, 2, 4, 8]


@pytest.mark.parametrize("together", [1, 2, None])
def test_groups_of_one_example_are_shuffled_as_if_there_were_none(together: int | None) -> None:
    alone = order(12, groups=[7, 3, 9, 1, 0, 2, 4, 5, 6, 8, 11, 10], together=together)
    assert stream(alone) == stream(order(12))


@pytest.mark.parametrize("seed", range(5))
def test_drawing_each_example_by_itself_takes_no_notice_of_groups(seed: int) -> None:
    epoch = stream(order(12, groups=GROUPS, together=1, seed=seed))
    assert sorted(epoch) == list(range(12))
    assert len([group for group, _ in groupby(GROUPS[i] for i in epoch)]) > 6, "groups fall apart"


@pytest.mark.parametrize("seed", range(5))
def test_two_of_a_prompt_meet_in_every_batch_of_paired_data(seed: int) -> None:
    batches = order(32, batch_size=8, steps=12, groups=[i // 2 for i in range(32)], together=2, seed=seed)
    for micro in batches:
        assert all(b == a + 1 for a, b in list(pairwise(micro.rows))[::2])


# The order of validation

CASES = [case for case in product((1, 2, 5, 8, 17, 40), (1, 2, 4, 16), (1, 2, 3, 5)) if case[0] >= case[2]]


@pytest.mark.parametrize(("size", "batch_size", "world"), CASES)
def test_validation_sees_every_example_once(size: int, batch_size: int, world: int) -> None:
    ranks = [
        validation_order(size, Division(batch_size=batch_size, world_size=world, rank=rank)) for rank in range(world)
    ]
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
        validation_order(3, Division(batch_size=2, world_size=4))


@pytest.mark.parametrize(("size", "batch_size"), [(3, 1), (7, 2), (3, 8)])
def test_validation_runs_equally_many_forwards_on_every_rank(size: int, batch_size: int) -> None:
    # Sharded strategies gather weights in each forward: one more on one rank hangs them all.
    def forwards(rank: int) -> list[int]:
        data = PreferenceDataModule("none.jsonl", batch_size=batch_size)
        needs, tokenizer = DataNeeds(view="binary"), tiny.word_tokenizer(tiny.CHATML)
        data._prepared = Prepared(
            needs=needs,
            tokenizer=tokenizer,
            rows={"val": SplitRows(tiny.rows(size))},  # type: ignore[arg-type]
            intake=Intake(),
            label_counts=None,
            prompts=(),
        )
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, accumulate_grad_batches=1)  # type: ignore[assignment]
        return [len(batch.chunks) for batch in data.val_dataloader()]

    assert forwards(0) == forwards(1)
