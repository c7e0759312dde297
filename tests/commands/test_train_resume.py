"""Runs that are stopped and resumed are the uninterrupted one, to the bit."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import halos.commands.assembly
from tests.train_runs import LORA, RESUMABLE, SPEED, assert_same_run, assert_same_weights, column, run, run_until

pytestmark = pytest.mark.runs


def test_the_same_seed_gives_the_same_run(uninterrupted: tuple[Path, dict], tmp_path: Path) -> None:
    assert_same_run((tmp_path, run(tmp_path, *RESUMABLE)), uninterrupted)


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 1),  # before there is a checkpoint
        pytest.param("on_train_batch_end", 3, marks=pytest.mark.slow),  # between two checkpoints
        ("on_train_batch_start", 4),  # right behind a checkpoint
        pytest.param("on_validation_end", 3, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one(
    hook: str, step: int, uninterrupted: tuple[Path, dict], tmp_path: Path
) -> None:
    run_until(hook, step, tmp_path, *RESUMABLE)
    assert_same_run((tmp_path, run(tmp_path, *RESUMABLE, "resume=auto")), uninterrupted)


@pytest.mark.slow
def test_a_run_stopped_between_a_checkpoint_and_its_validation_resumes(tmp_path: Path) -> None:
    options = (*RESUMABLE, "checkpoint.every=3")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(whole, *options)
    run_until("on_validation_start", 3, stopped, *options)
    summary = run(stopped, *options, "resume=auto")
    assert summary["train_loss"] == expected["train_loss"]
    assert_same_weights(whole, stopped)
    assert column(stopped, "train/loss") == column(whole, "train/loss")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("loss=bco",), marks=pytest.mark.slow),  # its reward shift
        pytest.param(  # its groups
            ("loss=grpo", "data.source.completions_per_prompt=4", "data.batch_size=8"), marks=pytest.mark.slow
        ),
        pytest.param(  # its reference: once before the stop, once after it
            ("reference_sync.every=3", "model.reference=live"), marks=pytest.mark.slow
        ),
        pytest.param((*LORA, "model.lora.dropout=0.1"), marks=pytest.mark.slow),
        pytest.param(  # a value head next to the adapters
            (*LORA, "loss=ppo", "model.reference=cached"), marks=pytest.mark.slow
        ),
        pytest.param(("loss.reference_point=running", "loss.reference_point_steps=3"), marks=pytest.mark.slow),
        ("loss.reference_point=policy", "loss.reference_point_steps=3"),
        pytest.param(("loss=bco", "loss.reference_point=running"), marks=pytest.mark.slow),
        pytest.param(("loss.reference_point=per_prompt",), marks=pytest.mark.slow),
        pytest.param(("loss.reference_point=token",), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_what_a_run_has_learnt_beside_its_weights_resumes(words: tuple[str, ...], tmp_path: Path) -> None:
    options = (*RESUMABLE, *words)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(whole, *options)
    run_until("on_train_batch_start", 4, stopped, *options)
    assert_same_run((stopped, run(stopped, *options, "resume=auto")), (whole, expected))


@pytest.mark.slow
def test_accumulated_steps_resume(tmp_path: Path) -> None:
    options = (*RESUMABLE, "trainer.accumulate_grad_batches=2", "trainer.max_epochs=2", "checkpoint.every=1")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(whole, *options)
    run_until("on_train_batch_start", 4, stopped, *options)
    assert_same_run((stopped, run(stopped, *options, "resume=auto")), (whole, expected))


class StopWithinStep(pl.Callback):
    """Asks the run to end from the third micro-batch on, as ``trainer.max_time`` does."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.should_stop or batch_idx >= 2


@pytest.mark.slow
def test_steps_of_several_micro_batches_are_never_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options: tuple[str, ...] = (
        "data.batch_size=1",
        "trainer.accumulate_grad_batches=4",
        "trainer.log_every_n_steps=10",
    )
    whole = run(tmp_path / "whole", *options, "trainer.max_steps=5", "trainer.val_check_interval=0.3")
    assert whole["steps"] == 5
    assert list(column(tmp_path / "whole", "val/loss")) == [0, 2, 4, 5]
    callbacks = halos.commands.assembly._callbacks
    monkeypatch.setattr(halos.commands.assembly, "_callbacks", lambda *pieces: [*callbacks(*pieces), StopWithinStep()])
    options = (*options, "trainer.max_steps=5", "trainer.val_check_interval=0.3")
    stopped = run(tmp_path / "stopped", *options)
    assert stopped["train_loss"] == whole["train_loss"][:1]
    assert "stopped after 1 of 5 steps; resume=auto goes on" in caplog.text
    monkeypatch.undo()
    resumed = run(tmp_path / "stopped", *options, "resume=auto")
    assert resumed["train_loss"] == whole["train_loss"]
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")


class StopEachStep(pl.Callback):
    """Sends this process SIGTERM at the first micro-batch of a step."""

    def on_train_batch_start(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def run_step_by_step(folder: Path, *overrides: str) -> dict[str, Any]:
    """A run that a signal ends behind each of its steps, before the validation that may be due."""
    callbacks = halos.commands.assembly._callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halos.commands.assembly, "_callbacks", lambda *pieces: [*callbacks(*pieces), StopEachStep()])
        for step in range(1, 7):
            with pytest.raises(SystemExit) as end:
                run(folder, *overrides, "resume=auto")
            assert end.value.code == 143
            assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
        return run(folder, *overrides, "resume=auto")


@pytest.mark.parametrize(
    "words",
    [
        (),
        pytest.param(("loss=ppo", "logger=tensorboard"), marks=pytest.mark.slow),
        pytest.param(("trainer.accumulate_grad_batches=2", "data.batch_size=2"), marks=pytest.mark.slow),
    ],
    ids=["kto", "ppo", "accumulated"],
)
def test_a_run_interrupted_at_each_step_is_the_uninterrupted_one(words: tuple[str, ...], tmp_path: Path) -> None:
    options = (*RESUMABLE, *words)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(whole, *options)
    assert_same_run((stopped, run_step_by_step(stopped, *options)), (whole, expected))
    assert points(stopped) == points(whole)
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == {"last.ckpt", "step_5.ckpt", "step_6.ckpt"}


def points(folder: Path) -> list[tuple[str, int, float]]:
    """What TensorBoard has of a run, without what a clock said."""
    found = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}, purge_orphaned_data=False)
    if (folder / "tensorboard").exists():
        found.Reload()
    tags = [tag for tag in found.Tags()["scalars"] if tag not in SPEED] if (folder / "tensorboard").exists() else []
    return sorted((tag, event.step, event.value) for tag in tags for event in found.Scalars(tag))
