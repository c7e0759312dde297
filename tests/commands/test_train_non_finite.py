"""Losses that are not finite: the run stops behind its last checkpoint, or skips the step."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import halos.commands.assembly
from tests.train_runs import column, run

pytestmark = pytest.mark.runs

POISONED = """
from halos.objectives import SFT

class Poisoned(SFT):
    def compute(self, batch, policy, reference):
        output = super().compute(batch, policy, reference)
        if self.training and self.trainer.global_step == 2:
            output.loss["sft"].total = output.loss["sft"].total * float("nan")
        return output
"""


@pytest.mark.parametrize("log_every", [1, 10])
def test_a_loss_that_is_not_a_number_stops_the_run_behind_its_last_checkpoint(
    log_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "poisoned.py").write_text(POISONED)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "run"
    words = (f"trainer.log_every_n_steps={log_every}", "checkpoint.every=1")
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 3; .*Examples of this step: toy/train:\d+#\d+"):
        run(folder, "loss=sft", "loss._target_=poisoned.Poisoned", *words)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values() if tensor.is_floating_point())
    assert not (folder / "summary.json").exists()
    assert list(column(folder, "train/loss")) == ([1, 2] if log_every == 1 else [])


class Trace(pl.Callback):
    """Weights and the optimizer's moments behind each step."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        moments = [v.tolist() for state in trainer.optimizers[0].state.values() for v in state.values()]
        self.seen.append([[p.tolist() for p in module.parameters()], moments])


def test_a_step_that_is_not_finite_is_skipped_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "poisoned.py").write_text(POISONED)
    monkeypatch.syspath_prepend(tmp_path)
    callbacks, trace = halos.commands.assembly._callbacks, Trace()
    monkeypatch.setattr(halos.commands.assembly, "_callbacks", lambda *pieces: [*callbacks(*pieces), trace])
    folder = tmp_path / "run"
    words = (
        "loss=sft",
        "loss._target_=poisoned.Poisoned",
        "non_finite=skip",
        "trainer.max_steps=5",
        "data.batch_size=2",
    )
    summary = run(folder, *words)
    assert [loss is None for loss in summary["train_loss"]] == [False, False, True, False, False]
    assert summary["skipped_steps"] == 1
    assert list(column(folder, "train/skipped_steps").values()) == [0, 0, 1, 1, 1]
    assert trace.seen[1] == trace.seen[2]
    assert trace.seen[2][0] != trace.seen[3][0]
    assert any("loss is nan at step 3" in told and "toy/train:" in told for told in caplog.messages)
    assert json.loads((folder / "summary.json").read_text())["train_loss"][2] is None


@pytest.mark.parametrize("rate", ["1e30", "inf"])
@pytest.mark.parametrize("interval", ["0.1", "1.0"])
def test_a_rate_that_destroys_the_model_stops_the_run_with_the_examples(
    rate: str, interval: str, tmp_path: Path
) -> None:
    words = [f"optim.lr={rate}", f"trainer.val_check_interval={interval}", "logger=tensorboard"]
    with pytest.raises((FloatingPointError, ValueError), match=r"toy/(train|val):\d+#\d+|optim\.lr: expected"):
        run(tmp_path, *words)
    assert not (tmp_path / "summary.json").exists()
