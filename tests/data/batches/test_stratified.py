"""Stratified order: both classes in every step, whichever way a step is divided."""

from typing import Any

import pytest

from halos.data.batches.order import Division, StratifiedOrder, TrainingOrder


def order(labels: list[bool], **options: int) -> StratifiedOrder:
    return StratifiedOrder(len(labels), Division(**{"batch_size": 4, "steps": 40, **options}), labels=labels)


def steps(made: TrainingOrder) -> list[tuple[int, ...]]:
    return [micro.step for micro in made][:: made.division.accumulate]


@pytest.mark.parametrize("rare", [1, 3, 9, 20, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_step_lacks_a_class(rare: int, seed: int) -> None:
    labels = [n < rare for n in range(80)]
    for step in steps(order(labels, seed=seed)):
        assert {labels[i] for i in step} == {True, False}
    plain = TrainingOrder(80, Division(batch_size=4, steps=40, seed=seed))
    assert rare >= 20 or any(len({labels[i] for i in step}) == 1 for step in steps(plain)), "the test would see it"


def test_an_even_data_set_is_seen_once_an_epoch_in_a_new_order_each_time() -> None:
    labels = [n % 2 == 0 for n in range(80)]
    seen = [i for step in steps(order(labels)) for i in step]
    assert sorted(seen[:80]) == sorted(seen[80:]) == list(range(80))
    assert seen[:80] != seen[80:]
    assert seen != [i for step in steps(order(labels, seed=1)) for i in step]


def test_steps_do_not_depend_on_their_division() -> None:
    labels = [n < 5 for n in range(60)]
    whole = steps(order(labels, batch_size=8, steps=12))
    ranks = [list(order(labels, batch_size=2, accumulate=2, world_size=2, rank=rank, steps=12)) for rank in (0, 1)]
    assert [micro.step for micro in ranks[0]][::2] == whole
    for number, step in enumerate(whole):
        parts = [ranks[rank][2 * number + half].rows for half in (0, 1) for rank in (0, 1)]
        assert sum(parts, ()) == step


def test_one_class_alone_and_a_resumed_run() -> None:
    assert len(steps(order([True] * 10))) == 40
    labels = [n < 3 for n in range(30)]
    late = order(labels)
    late.start = 17
    assert steps(late) == steps(order(labels))[17:]


@pytest.mark.parametrize(
    ("labels", "options", "said"),
    [
        ([-1, -1], {}, "expected a loss that learns from labels"),
        ([True, False], {"batch_size": 1}, "expected at least two examples in a step"),
    ],
)
def test_what_cannot_be_stratified(labels: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        order(labels, **options)
