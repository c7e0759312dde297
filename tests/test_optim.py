"""The learning-rate schedule by hand, and what the optimizer refuses."""

import importlib.util
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from halos.optim import Adafactor, AdamW, BitsAndBytesAdamW, Optim, RMSprop, learning_rate_factor


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


def rates(optim: Optim, steps: int) -> list[float]:
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
        ({"betas": (0.9,)}, r"^optim\.betas: expected two numbers from 0 to below 1, found \(0\.9,\)"),
        ({"betas": 0.9}, r"^optim\.betas: expected two"),
        ({"betas": [0.9, 1.5]}, r"^optim\.betas: expected two"),
        ({"eps": -1.0}, r"^optim\.eps: expected a number from 0 on, found -1"),
        ({"eps": [1e-30, 1e-3]}, r"^optim\.eps: expected a number"),
        ({"lr": "fast"}, r"^optim\.lr: expected a number from 0 on, found 'fast'"),
        ({"schedule": "exponential"}, r"^optim\.schedule: expected one of constant, linear, cosine; found 'exponen"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(**options)


# Others than AdamW


def test_their_own_values_are_refused_by_key_too() -> None:
    with pytest.raises(ValueError, match=r"^optim\.alpha: expected a number from 0 to below 1, found -3"):
        RMSprop(alpha=-3)
    with pytest.raises(ValueError, match=r"^optim\.eps: expected a number from 0 on, found -1"):
        RMSprop(eps=-1)
    with pytest.raises(ValueError, match=r"^optim\.eps: expected one or two numbers .* found \[1, 2, 3\]"):
        Adafactor(eps=[1, 2, 3])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^optim\.eps: expected one or two numbers .* found -1"):
        Adafactor(eps=-1)


def test_one_eps_of_adafactor_is_beside_gradients_not_their_squares() -> None:
    made = [Adafactor(eps=eps).build([Parameter(torch.ones(2))], 1)[0] for eps in (0.01, (1e-4, 1e-3))]
    assert made[0].defaults["eps"] == pytest.approx(made[1].defaults["eps"], rel=1e-12)


@pytest.mark.parametrize("scale_parameter", [False, True])
def test_adafactor_by_hand(scale_parameter: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    gradients = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    weight = Parameter(start.clone())
    optim = Adafactor(lr=0.1, clip_threshold=0.5, schedule="constant", warmup=0, scale_parameter=scale_parameter)
    optimizer, _ = optim.build([weight], 2)
    expected, second = start.clone(), torch.zeros(3, 5, dtype=torch.float64)
    for step, gradient in enumerate(gradients, 1):
        weight.grad = gradient.clone()
        optimizer.step()
        decay = 1 - step**-0.8
        second = decay * second + (1 - decay) * gradient**2
        # Adafactor, eq. 2 and algorithm 4: V = R Cᵀ / 1ᵀR, then the update clipped by its root mean square.
        factored = second.sum(1, keepdim=True) * second.sum(0, keepdim=True) / second.sum()
        update = gradient / factored.sqrt()
        update /= max(1.0, update.pow(2).mean().sqrt().item() / 0.5)
        scale = expected.pow(2).mean().sqrt().item() if scale_parameter else 1.0
        expected = expected - 0.1 * scale * update
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-9)


def test_adafactor_follows_the_schedule_and_keeps_means_of_rows_and_columns_alone() -> None:
    assert rates(Adafactor(lr=1.0, warmup=0.4), 5) == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])
    weight = Parameter(torch.ones(30, 50))
    optimizer, _ = Adafactor(lr=1.0).build([weight], 5)
    weight.grad = torch.ones(30, 50)
    optimizer.step()
    held = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor) and value.dim()]
    assert sum(value.numel() for value in held) == 30 + 50


def test_rmsprop_by_hand() -> None:
    weight = Parameter(torch.tensor([1.0, -2.0]))
    optimizer, _ = RMSprop(lr=0.1, alpha=0.9, eps=0.01, weight_decay=0.5, warmup=0).build([weight], 5)
    expected, moments = [1.0, -2.0], [0.0, 0.0]
    for gradients in ([3.0, 0.5], [-1.0, 2.0]):
        weight.grad = torch.tensor(gradients)
        optimizer.step()
        for n, found in enumerate(gradients):
            whole = found + 0.5 * expected[n]
            moments[n] = 0.9 * moments[n] + 0.1 * whole**2
            expected[n] -= 0.1 * whole / (math.sqrt(moments[n]) + 0.01)
    assert weight.tolist() == pytest.approx(expected, abs=1e-6)


def test_bitsandbytes_and_its_device_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"^optim: bitsandbytes is missing; .*halos\[bnb\]"):
        BitsAndBytesAdamW().check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^optim: .*need a CUDA device, found none"):
        BitsAndBytesAdamW().check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"^optim: .*weights on a CUDA device, found cpu"):
        BitsAndBytesAdamW().build([Parameter(torch.ones(1))], 5)
    with pytest.raises(ValueError, match=r"^optim\.bits: expected 8 or 32, found 4"):
        BitsAndBytesAdamW(bits=4)


@pytest.mark.parametrize(("bits", "paged"), [(8, False), (32, True)])
def test_the_options_reach_bitsandbytes(bits: int, paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda: Any = SimpleNamespace(device=torch.device("cuda"))

    def recorded(parameters: Any, *, optim_bits: int, is_paged: bool, **options: Any) -> torch.optim.Optimizer:
        assert (optim_bits, is_paged) == (bits, paged)
        assert parameters == [on_cuda]
        return torch.optim.AdamW([Parameter(torch.ones(1))], **options)

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW=recorded)))
    monkeypatch.setattr(BitsAndBytesAdamW, "check", lambda _: None)
    optim = BitsAndBytesAdamW(lr=0.5, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, bits=bits, paged=paged)
    optimizer, _ = optim.build([on_cuda], 5)
    group = optimizer.param_groups[0]
    assert (group["initial_lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.8, 0.9), 1e-6, 0.1)
