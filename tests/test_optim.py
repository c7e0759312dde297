"""The learning-rate schedule by hand, and what the optimizer refuses."""

import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from halos.optim import AdamW, learning_rate_factor


def factors(steps: int, warmup: int, schedule: str) -> list[float]:
    return [learning_rate_factor(step, warmup=warmup, steps=steps, schedule=schedule) for step in range(steps + 1)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 2, [1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", 0, [1, 3 / 4, 1 / 2, 1 / 4, 0]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 1 / 2, 0]),
        ("cosine", 0, [1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5), 0]),
        ("cosine", 2, [1 / 3, 2 / 3, 1, 1 / 2, 0]),
        ("linear", 4, [1 / 5, 2 / 5, 3 / 5, 4 / 5, 0]),
        ("linear", 9, [1 / 10, 2 / 10, 3 / 10, 4 / 10, 5 / 10]),  # warm-up longer than the run
    ],
)
def test_the_schedule_by_hand(schedule: str, warmup: int, expected: list[float]) -> None:
    assert factors(4, warmup, schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 10])
def test_no_step_of_the_run_has_rate_zero_and_none_is_above_the_peak(schedule: str, warmup: int) -> None:
    rates = factors(10, warmup, schedule)[:-1]
    assert min(rates) > 0
    assert max(rates) <= 1
    assert learning_rate_factor(99, warmup=warmup, steps=10, schedule=schedule) == 0


def rates(optim: AdamW, steps: int) -> list[float]:
    """The rate that each optimizer step uses."""
    optimizer, schedule = optim.build([Parameter(torch.ones(1))], steps)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return used


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (0.0, [1, 0.8, 0.6, 0.4, 0.2]),
        (0.4, [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),  # a fraction of the run: two steps of five
        (1, [1 / 2, 1, 3 / 4, 1 / 2, 1 / 4]),  # a number of steps
        (2, [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
    ],
)
def test_warmup_is_a_fraction_or_a_number_of_steps(warmup: float, expected: list[float]) -> None:
    assert rates(AdamW(lr=1.0, warmup=warmup), 5) == pytest.approx(expected)


def test_a_run_of_one_step_uses_the_full_rate() -> None:
    assert rates(AdamW(lr=0.5), 1) == [0.5]


def test_the_options_reach_the_optimizer() -> None:
    optimizer, _ = AdamW(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6).build([Parameter(torch.ones(1))], 10)
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], tuple(group["betas"]), group["eps"]) == (0.1, (0.8, 0.9), 1e-6)


def test_a_rate_of_zero_leaves_the_weights() -> None:
    weight = Parameter(torch.tensor([1.5]))
    optimizer, schedule = AdamW(lr=0.0, weight_decay=0.1).build([weight], 3)
    weight.grad = torch.ones(1)
    optimizer.step()
    schedule.step()
    assert weight.item() == 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-6}, r"^optim\.lr: .*found -1e-06"),
        ({"lr": math.nan}, r"^optim\.lr"),
        ({"weight_decay": -0.1}, r"^optim\.weight_decay"),
        ({"warmup": -1}, r"^optim\.warmup"),
        ({"schedule": "exponential"}, r"^optim\.schedule: expected one of constant, linear, cosine; found 'exponen"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(**options)
