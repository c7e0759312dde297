"""Which strategies, devices and precisions go together."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from halos.sharding.fsdp import FSDP, ShardedMixed
from halos.training.trainer import check_precision, make_trainer, validation_interval
from tests.configs import compose

ASKED = {"strategy": "auto", "accelerator": "cpu", "lr": 1e-3}


def trainer(*words: str) -> Any:
    return make_trainer(compose("trainer.accelerator=cpu", "output_dir=out", *words), [], [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("precision=fp8",), "precision: expected one of 32-true, bf16-mixed, bf16-true, 16-mixed; found 'fp8'"),
        (("precision=16-mixed",), "16-mixed: expected a CUDA device, found trainer.accelerator=cpu"),
        (("precision=16-mixed", "strategy=fsdp"), "strategy=fsdp has no loss scaling; use precision=bf16-mixed"),
        (("precision=16-mixed", "strategy=fsdp_tp"), "strategy=fsdp_tp has no loss scaling; use precision=bf16-mixed"),
        (
            ("strategy=fsdp_tp", "model.lora.enabled=true"),
            "model.lora.enabled: expected strategy=auto, ddp or fsdp, found fsdp_tp",
        ),
        (
            ("strategy=fsdp_tp", "trainer.devices=4", "strategy.tensor_parallel_size=3"),
            "tensor_parallel_size: expected a divisor of the 4 devices",
        ),
        (
            ("model.attention=flash_attention_2", "precision=bf16-mixed"),
            "model.attention: expected sdpa or null with precision=bf16-mixed and strategy=auto, found flash_attention",
        ),
        (
            ("strategy=fsdp", "optim=adamw_8bit"),
            "optim: expected strategy=auto or ddp with bitsandbytes' AdamW, found fsdp",
        ),
        (
            ("model.packed_attention=flex",),
            "model.packed_attention=flex: expected a CUDA device, found trainer.accelerator",
        ),
        (("model.lora.quantize=4bit",), "model.lora.quantize: expected a CUDA device, found trainer.accelerator=cpu"),
        (("trainer.devices=2",), "strategy=auto uses one device, found 2"),
        (("trainer.devices=[0,1]",), r"strategy=auto uses one device, found \[0, 1\]"),
        (
            ("strategy=fsdp", "model.lora.enabled=true", "model.lora.quantize=4bit"),
            "model.lora.quantize: expected strategy=auto or ddp, found fsdp",
        ),
        (
            ("strategy=fsdp", "data.max_tokens_per_batch=64"),
            "data.max_tokens_per_batch: expected strategy=auto or ddp, found fsdp",
        ),
        (("strategy=fsdp", "strategy.trainer.replicas=0"), "replicas: expected a whole number from 1 on, found 0"),
        (
            ("strategy=fsdp", "trainer.devices=3", "strategy.trainer.replicas=2"),
            "replicas: expected a divisor of the 3 devices, found 2",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trainer(*words)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(ValueError, match=r"pip install 'halos\[deepspeed\]'"):
        trainer("strategy=deepspeed")


def test_with_cuda_half_precision_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_precision("16-mixed", **{**ASKED, "accelerator": "gpu"})
    with pytest.raises(ValueError, match=r"found trainer\.accelerator=cpu"):
        check_precision("16-mixed", **ASKED)


@pytest.mark.parametrize(
    ("precision", "lr", "warned"), [("bf16-true", 5e-7, True), ("bf16-true", 1e-3, False), ("bf16-mixed", 5e-7, False)]
)
def test_steps_too_small_for_bfloat16_weights_are_warned_of(
    precision: str, lr: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    check_precision(precision, **{**ASKED, "lr": lr})
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
    made.strategy._device_mesh = "mesh"
    assert made.strategy.sharding.compute_dtype == (torch.bfloat16 if precision == "bf16-mixed" else None)


@pytest.mark.parametrize(
    ("interval", "accumulate", "expected"),
    [(0.25, 1, 2), (0.25, 4, 8), (1.0, 4, 40), (0.01, 4, 4), (0.99, 4, 36), (3, 1, 3), (8, 4, 8), (40, 4, 40)],
)
def test_validations_are_behind_whole_steps(interval: float, accumulate: int, expected: int) -> None:
    assert validation_interval(interval, steps=10, accumulate=accumulate) == expected


@pytest.mark.parametrize("interval", [0, -1, 0.0, 1.5, 6, 44, True, "00:00:10:00", None])
def test_other_validations_are_refused(interval: Any) -> None:
    said = r"val_check_interval: expected at most the 40 micro-batches of the run, a multiple of .*=4, or a share"
    with pytest.raises(ValueError, match=said):
        validation_interval(interval, steps=10, accumulate=4)


def test_one_device_is_taken_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr("lightning.pytorch.Trainer", lambda **options: made.append(options["devices"]))
    for words in (("trainer.devices=auto",), ("trainer.devices=null",), ("trainer.devices=1",), ()):
        trainer(*words)
    assert made == [1, 1, 1, 1]


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_validation_makes_tensors_that_can_be_trained_with(strategy: str) -> None:
    made = trainer(f"strategy={strategy}", "trainer.devices=1")
    assert not made.validate_loop.inference_mode
    assert not made.fit_loop.epoch_loop.val_loop.inference_mode
