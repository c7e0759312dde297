"""Steps are read together, each with its own numbers, and time is counted while the clock runs."""

from typing import Any

import pytest
import torch

from halos.loop.steps import Steps, complete
from halos.metrics import Mean


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("halos.loop.steps.time", clock)
    return clock


class Examples(list[str]):
    """What a batch tells about itself."""

    ids = property(list)
    total_tokens = property(lambda self: 10 * len(self))


def add(steps: Steps, *ids: str, loss: float = 0.0) -> None:
    batch: Any = Examples(ids)
    steps.add(batch, {"loss/sft": Mean(torch.tensor(loss * len(ids)), len(ids))}, None)


def test_each_step_has_its_examples_and_numbers(clock: Clock) -> None:
    steps = Steps()
    add(steps, "a", "b", loss=1.0)
    add(steps, "c", "d", loss=2.0)
    steps.end(1, torch.tensor(0.25), lr=0.1)
    add(steps, "e", loss=5.0)
    steps.end(2, torch.tensor(4.0), lr=0.2)
    assert [step.number for step in steps.unread] == [1, 2]
    (first, of_first), (second, of_second) = steps.read(1)
    assert (first.ids, second.ids) == (["a", "b", "c", "d"], ["e"])
    assert of_first == {"loss": 1.5, "grad_norm": 0.25, "lr": 0.1}
    assert of_second == {"loss": 5.0, "grad_norm": 4.0, "lr": 0.2}
    assert steps.unread == []


def test_speed_is_over_the_time_that_the_clock_ran(clock: Clock) -> None:
    steps = Steps()
    steps.begin()
    add(steps, "a", "b")
    steps.end(1, torch.tensor(1.0), lr=0.1)
    clock.now += 1
    steps.pause()
    clock.now += 50  # a checkpoint
    steps.begin()
    add(steps, "c", "d", "e", "f")
    steps.end(2, torch.tensor(1.0), lr=0.1)
    clock.now += 2
    (_, of_first), (_, of_second) = steps.read(2)
    assert "examples_per_second" not in of_first
    assert of_second["examples_per_second"] == 2 * 6 / 3
    assert of_second["tokens_per_second"] == 2 * 60 / 3
    clock.now += 4
    add(steps, "g")
    steps.end(3, torch.tensor(1.0), lr=0.1)
    ((_, of_third),) = steps.read(1)
    assert of_third["examples_per_second"] == 1 / 4


def test_what_follows_from_other_metrics() -> None:
    rewards = {"rewards/chosen": 0.5, "rewards/rejected": -1.0}
    assert complete({"loss/a": 1.0, "loss/b": 0.5, **rewards}, ["loss/a", "loss/b", *rewards]) == {
        "loss/a": 1.0,
        "loss/b": 0.5,
        "loss": 1.5,
        **rewards,
        "rewards/margins": 1.5,
    }
    assert complete({"loss/a": 2.0, "rewards/chosen": 0.5}, ["loss/a"]) == {"loss": 2.0, "rewards/chosen": 0.5}
    # A step without an example for the other term.
    assert complete({"loss/a": 2.0}, ["loss/a", "loss/b"]) == {"loss": 2.0, "loss/a": 2.0}


def test_nothing_of_it_is_saved() -> None:
    assert not Steps().state_dict()
