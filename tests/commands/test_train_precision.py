"""Lower precisions: where a run starts, what it saves, and what is warned of."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from transformers import AutoModelForCausalLM

import halos.commands.assembly
import halos.commands.export
from halos.training.trainer import warn_if_emulated
from tests.train_runs import column, run, weights


@pytest.mark.runs
def test_gradients_are_clipped_and_logged_without_the_scale_of_16_mixed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("trainer.max_steps=3", "optim.lr=1e-2", "trainer.gradient_clip_val=0.1")
    expected = run(tmp_path / "32", *words)

    def scaled(*, precision: str, plugins: list[Any], **options: Any) -> pl.Trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        return pl.Trainer(plugins=[*plugins, MixedPrecision("16-mixed", "cpu", scaler)], **options)

    monkeypatch.setattr(halos.training.trainer, "check_precision", lambda *_: None)  # the real ones want a GPU
    for module in ("config.values", "commands.assembly"):
        monkeypatch.setattr(f"halos.{module}.check_combinations", lambda _: None)
    monkeypatch.setattr(halos.training.trainer, "pl", SimpleNamespace(Trainer=scaled))
    found = run(tmp_path / "16", *words, "precision=16-mixed")
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
    norms = [list(column(tmp_path / name, "train/grad_norm").values()) for name in ("16", "32")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    assert min(norms[1]) > 0.1


@pytest.mark.parametrize(
    ("precision", "device", "capabilities", "warned"),
    [
        ("bf16-mixed", "cpu", {"architecture": "x86_64", "avx512_bf16": False}, True),
        ("bf16-true", "cpu", {"architecture": "x86_64"}, True),
        ("bf16-mixed", "cpu", {"architecture": "x86_64", "amx_bf16": True}, False),
        ("bf16-mixed", "cpu", {"architecture": "aarch64"}, False),
        ("bf16-mixed", "cpu", {}, False),
        ("bf16-mixed", "cuda", {"architecture": "x86_64"}, False),
        ("32-true", "cpu", {"architecture": "x86_64"}, False),
    ],
)
def test_emulated_bfloat16_is_warned_of(
    precision: str, device: str, capabilities: dict[str, Any], warned: bool, caplog: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    warn_if_emulated(precision, torch.device(device))
    assert bool(caplog.messages) is warned


@pytest.mark.runs
@pytest.mark.parametrize(
    ("precision", "reference", "loss", "feedback", "first"),
    [
        ("bf16-mixed", "live", "kto", "labels", 0.5),
        ("bf16-mixed", "cached", "kto", "labels", 0.5),
        ("bf16-true", "live", "dpo", "pairs", math.log(2)),
    ],
)
def test_lower_precisions_start_at_the_reference_too(
    precision: str,
    reference: str,
    loss: str,
    feedback: str,
    first: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policies = []
    export = halos.commands.export.export_policy  # type: ignore[attr-defined]
    monkeypatch.setattr(
        halos.commands.export,
        "export_policy",
        lambda policy, *a, **k: [policies.append(policy), export(policy, *a, **k)],
    )
    options = [f"precision={precision}", f"model.reference={reference}", f"loss={loss}"]
    options += [f"data.source.feedback={feedback}", "trainer.max_steps=2", "sampling.size=4"]
    summary = run(tmp_path, *options)
    assert summary["precision"] == precision
    # Computed beforehand, in other packs, the reference's log-probs differ by bfloat16's rounding.
    assert column(tmp_path, "val/loss")[0] == pytest.approx(first, abs=1e-6 if reference == "live" else 1e-3)
    assert all(map(math.isfinite, summary["train_loss"]))
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {dtype}
    # What is not saved (rotary frequencies) has to be what the policy was trained with, too.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(buffer, loaded.get_buffer(name)) for name, buffer in policies[0].named_buffers())
