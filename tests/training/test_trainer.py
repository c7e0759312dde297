"""The Trainer of a run: devices, precision, and the interval between validations."""

from __future__ import annotations

import importlib.util
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from omegaconf import OmegaConf

from halos.config.devices import build_strategy
from halos.sharding.fsdp import FSDP, ShardedMixed
from halos.training.trainer import check_precision, make_trainer, validation_interval, warn_of_lost_steps
from tests.configs import compose


def trainer(*words: str) -> Any:
    cfg = compose("trainer.accelerator=cpu", "output_dir=out", *words)
    return make_trainer(
        OmegaConf.to_container(cfg.trainer, resolve=True),  # type: ignore[arg-type]
        strategy=build_strategy(cfg.strategy),
        precision=cfg.precision,
        output_dir=cfg.output_dir,
        callbacks=[],
        loggers=[],
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("precision=fp8",), "precision: expected one of 32-true, bf16-mixed, bf16-true, 16-mixed; found 'fp8'"),
        (
            ("precision=16-mixed",),
            "precision: expected bf16-mixed without a CUDA device, found 16-mixed with trainer.accelerator=cpu",
        ),
        (
            ("trainer.accelerator=cpus",),
            "trainer.accelerator: expected one of auto, gpu, cpu, cuda, mps, tpu; found 'cpus'",
        ),
        (("trainer.accelerator=tpu",), "trainer.accelerator: expected one of this machine, such as cpu, found tpu"),
        (
            ("strategy=fsdp_tp", "trainer.devices=4", "strategy.tensor_parallel_size=3"),
            "tensor_parallel_size: expected a divisor of the 4 devices",
        ),
        (("strategy=fsdp", "strategy.trainer.replicas=0"), "replicas: expected a whole number from 1 on, found 0"),
        (
            ("strategy=fsdp", "trainer.devices=3", "strategy.trainer.replicas=2"),
            "replicas: expected a divisor of the 3 devices, found 2",
        ),
    ],
)
def test_what_this_machine_cannot_do_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trainer(*words)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(ValueError, match=r"pip install 'halos\[deepspeed\]'"):
        trainer("strategy=deepspeed")


def test_with_cuda_half_precision_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_precision("16-mixed", "gpu")
    with pytest.raises(ValueError, match=r"found 16-mixed with trainer\.accelerator=cpu"):
        check_precision("16-mixed", "cpu")


@pytest.mark.parametrize(
    ("precision", "lr", "warned"), [("bf16-true", 5e-7, True), ("bf16-true", 1e-3, False), ("bf16-mixed", 5e-7, False)]
)
def test_steps_too_small_for_bfloat16_weights_are_warned_of(
    precision: str, lr: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_lost_steps(precision, lr)
    assert bool(caplog.messages) is warned


def test_the_warned_of_steps_are_lost_and_others_are_not() -> None:
    weights = torch.full((10,), 0.02, dtype=torch.bfloat16)
    assert torch.equal(weights - 1e-5, weights)
    assert not torch.equal(weights - 1e-4, weights)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_shards_compute_in_the_precision_asked_for(precision: str) -> None:
    made = trainer("strategy=fsdp", f"precision={precision}", "optim.lr=1e-3")
    assert isinstance(made.strategy, FSDP)
    assert made.precision == precision
    assert isinstance(made.precision_plugin, ShardedMixed) is (precision == "bf16-mixed")
    made.strategy._device_mesh = "mesh"  # type: ignore[assignment]
    assert made.strategy.sharding.compute_dtype == (torch.bfloat16 if precision == "bf16-mixed" else None)


@pytest.mark.parametrize(
    ("interval", "accumulate", "expected"),
    [
        (0.25, 1, 3),
        (0.25, 4, 12),
        (1.0, 4, 40),
        (0.01, 4, 4),
        (0.9, 4, 36),
        (0.1, 1, 1),
        (3, 1, 3),
        (8, 4, 8),
        (40, 4, 40),
    ],
)
def test_validations_are_behind_whole_steps(interval: float, accumulate: int, expected: int) -> None:
    assert validation_interval(interval, steps=10, accumulate=accumulate) == expected


@pytest.mark.parametrize("interval", [0, -1, 0.0, 1.5, 6, 44, True, "00:00:10:00", None])
def test_other_validations_are_refused(interval: Any) -> None:
    said = r"val_check_interval: expected up to 40 micro-batches, all of the run, a multiple of .*=4, or a share"
    with pytest.raises(ValueError, match=said):
        validation_interval(interval, steps=10, accumulate=4)


def test_one_device_is_taken_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def make(**options: Any) -> MagicMock:
        made.append(options["devices"])
        return MagicMock()

    monkeypatch.setattr("lightning.pytorch.Trainer", make)
    for words in (("trainer.devices=auto",), ("trainer.devices=null",), ("trainer.devices=1",), ()):
        trainer(*words)
    assert made == [1, 1, 1, 1]


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_validation_makes_tensors_that_can_be_trained_with(strategy: str) -> None:
    made = trainer(f"strategy={strategy}", "trainer.devices=1")
    assert not made.validate_loop.inference_mode
    assert not made.fit_loop.epoch_loop.val_loop.inference_mode
