"""Checkpoints of a run: of another run, damaged, on a full disk, elsewhere, and finished."""

import csv
import json
import os
import resource
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import halos.commands.assembly
from halos.policy.loading import ModelSpec
from halos.processes.errors import RunFailed
from tests.train_runs import (
    LABELS,
    RESUMABLE,
    assert_same_run,
    assert_same_weights,
    column,
    jsonl,
    run,
    run_until,
    table,
    weights,
)


@pytest.mark.runs
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("loss.beta=0.3",), r"loss\.beta: 0\.5 in the checkpoint, 0\.3 now"),
        (("seed=1", "data.source.seed=0"), r"seed: 0 in the checkpoint, 1 now"),
        (("loss=kto_zero",), r"loss\.name: kto in the checkpoint, kto_zero now"),
        (("data.source.annotator.noise=0.3",), r"data \(train\): \w+ in the checkpoint, \w+ now"),
        (("data.batch_size=8",), r"examples per step: 4 in the checkpoint, 8 now"),
        (
            ("data.batch_size=2", "trainer.accumulate_grad_batches=2"),
            r"\(micro-batches per step: 1 in the checkpoint, 2 now\)",
        ),
        (("data.keep_together=1",), r"\(data\.keep_together: 2 in the checkpoint, 1 now\)"),
        (("data.stratified=true",), r"\(data\.stratified: False in the checkpoint, True now\)"),
        (
            ("model.random_weights=true", "sampling.kl=auto"),
            r"model\.random_weights: False in the checkpoint, True now",
        ),
    ],
)
def test_another_runs_checkpoint_is_refused_with_what_differs(
    words: tuple[str, ...], said: str, uninterrupted: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ModelSpec, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    checkpoint = uninterrupted[0] / "checkpoints" / "step_4.ckpt"
    with pytest.raises(ValueError, match=rf"resume: .*step_4\.ckpt belongs to another run .*{said}"):
        run(tmp_path, *RESUMABLE, *words, f"resume='{checkpoint}'")


@pytest.mark.runs
def test_a_damaged_checkpoint_makes_way_for_the_one_before(
    uninterrupted: tuple[Path, dict], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_until("on_train_batch_start", 5, tmp_path, *RESUMABLE)
    last = tmp_path / "checkpoints" / "last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    assert_same_run((tmp_path, run(tmp_path, *RESUMABLE, "resume=auto")), uninterrupted)
    assert any("damaged" in message and "going on from" in message for message in caplog.messages)


@pytest.mark.runs
def test_a_disk_that_is_full_ends_the_run_and_keeps_the_checkpoints_that_are_there(
    uninterrupted: tuple[Path, dict], tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    callbacks = halos.commands.assembly._callbacks

    class Fill(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # bytes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halos.commands.assembly, "_callbacks", lambda *pieces: [*callbacks(*pieces), Fill()])
        try:
            with pytest.raises(RunFailed, match=r"step_4\.ckpt: the checkpoint could not be written: File too large"):
                run(tmp_path, *RESUMABLE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "step_2.ckpt"}
    assert_same_run((tmp_path, run(tmp_path, *RESUMABLE, "resume=auto")), uninterrupted)


@pytest.mark.runs
def test_a_checkpoints_path_resumes_into_another_folder(uninterrupted: tuple[Path, dict], tmp_path: Path) -> None:
    run_until("on_train_batch_start", 4, tmp_path / "old", *RESUMABLE)
    checkpoint = tmp_path / "old" / "checkpoints" / "step_4.ckpt"
    # Hydra wants quotes round a value with an equals sign.
    summary = run(tmp_path / "new", *RESUMABLE, f"resume='{checkpoint}'")
    assert summary["train_loss"] == uninterrupted[1]["train_loss"]
    assert_same_weights(tmp_path / "new", uninterrupted[0])
    assert list(column(tmp_path / "new", "train/loss")) == [5, 6]


@pytest.mark.runs
def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    summary = run(tmp_path, "trainer.max_steps=2")
    rows, before = table(tmp_path), {k: v.tolist() for k, v in weights(tmp_path).items()}
    again = run(tmp_path, "trainer.max_steps=2", "resume=auto")
    assert again["train_loss"] == summary["train_loss"]
    assert again["metrics"] == summary["metrics"]
    assert {k: v.tolist() for k, v in weights(tmp_path).items()} == before
    assert [row for row in table(tmp_path) if row["train/loss"]] == [row for row in rows if row["train/loss"]]


@pytest.mark.runs
@pytest.mark.parametrize("steps", [1, 3])
def test_a_finished_run_cannot_be_made_longer_or_shorter(steps: int, tmp_path: Path) -> None:
    run(tmp_path, "trainer.max_steps=2")
    config = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match=f"resume: .* after 2 of 2 steps, but {steps} are asked for .*max_steps"):
        run(tmp_path, f"trainer.max_steps={steps}", "resume=auto")
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2
    assert (tmp_path / "config.yaml").read_text() == config


def test_resume_auto_in_an_empty_folder_is_a_new_run(tmp_path: Path) -> None:
    assert len(run(tmp_path, "resume=auto", "trainer.max_steps=1")["train_loss"]) == 1


@pytest.mark.usefixtures("no_model")
def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=r"resume: .*last\.ckpt"):
        run(tmp_path, "resume=auto")


FALLING = "val/logps/rejected"
"""Training lowers it from step to step, so the best validation is the first one after step 0."""
BEST = (*RESUMABLE, f"checkpoint.best={FALLING}", "checkpoint.export=best", "checkpoint.keep=1", "checkpoint.every=99")


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("best")
    return folder, run(folder, *BEST)


@pytest.mark.runs
def test_the_best_checkpoint_is_kept_and_exported(best: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, summary = best
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"step_3.ckpt", "best.ckpt", "step_6.ckpt", "last.ckpt"}
    assert (summary["steps"], summary["exported_step"]) == (6, 3)
    values = column(folder, FALLING)
    assert max((3, 6), key=values.__getitem__) == 3
    assert summary["metrics"]["logps/rejected"] == pytest.approx(values[3], rel=1e-6)
    state = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for name, weight in weights(folder).items():
        assert torch.equal(weight, state[f"backbone.policy.{name}"])
    last = run(tmp_path, *BEST, "checkpoint.export=last")
    assert last["exported_step"] == 6
    assert not torch.equal(*(weights(path)["lm_head.weight"] for path in (folder, tmp_path)))
    assert last["train_loss"] == summary["train_loss"]  # what is kept and exported changes no step


@pytest.mark.runs
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_start", "on_validation_end"])
def test_a_resumed_run_keeps_the_best_checkpoint_of_its_first_part(
    hook: str, best: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    step = 4 if hook == "on_train_batch_start" else 3
    run_until(hook, step, tmp_path, *BEST, *(["checkpoint.every=4"] if step == 4 else []))
    assert_same_run((tmp_path, run(tmp_path, *BEST, "resume=auto")), best)
    assert (tmp_path / "checkpoints" / "best.ckpt").samefile(tmp_path / "checkpoints" / "step_3.ckpt")


STOPPING = (
    "callbacks=early_stopping", f"callbacks.early_stopping.monitor={FALLING}", "callbacks.early_stopping.mode=max",
    "callbacks.early_stopping.patience=1", "trainer.val_check_interval=1", "optim.lr=1e-2",
)  # fmt: skip


@pytest.mark.runs
def test_a_metric_that_is_not_there_leaves_the_folder_free(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.best: expected one of"):
        run(tmp_path / "run", "checkpoint.best=val/acc", "logger=tensorboard")
    assert run(tmp_path / "run", "trainer.max_steps=1")["steps"] == 1


@pytest.mark.runs
def test_early_stopping_ends_a_run_that_is_complete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="halos")
    words = (*STOPPING, "sampling.kl=true", "sampling.kl_prompts=2", "sampling.validations=1")
    summary = run(tmp_path, *words)
    assert summary["metrics"]["kl"] > 0  # planned for the last step, which does not come
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    # The last step is not validated twice for it.
    assert [row["step"] for row in rows if row["val/loss"]] == ["0", "1", "2"]
    assert [(row["step"], float(row["val/kl"])) for row in rows if row["val/kl"]] == [("2", summary["metrics"]["kl"])]
    # The first validation in training is the best so far, the second one is worse.
    assert summary["steps"] == 2
    assert any("stopped after 2 of 6 steps: Monitored metric val/logps/rejected" in line for line in caplog.messages)
    assert not any("resume=auto goes on" in line for line in caplog.messages)
    again = run(tmp_path, *words, "resume=auto")
    assert again["steps"] == 2
    assert again["train_loss"] == summary["train_loss"]


@pytest.mark.runs
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("checkpoint.best=val/los",), r"checkpoint\.best: expected one of .*val/loss.*; found 'val/los'"),
        (
            (*STOPPING, "callbacks.early_stopping.monitor=val/acc"),
            r"callbacks\.early_stopping\.monitor: expected one of",
        ),
        (("+callbacks.a.b=1",), r"callbacks\.a: expected a _target_ and its arguments, found \{'b': 1\}"),
        (
            ("+callbacks.a._target_=halos.objectives.KTO",),
            r"callbacks\.a\._target_: expected a subclass of Callback, found halos\.objectives\.KTO",
        ),
        (("checkpoint.export=best",), r"checkpoint\.export: expected last without checkpoint\.best, found best"),
        (("checkpoint.export=newest",), r"checkpoint\.export: expected one of last, best; found 'newest'"),
    ],
)
def test_what_no_validation_can_give_is_refused_before_the_first_step(
    words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: pytest.fail("it trains"))
    with pytest.raises(ValueError, match=said):
        run(tmp_path, *words)


def test_a_best_checkpoint_needs_validation_data(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(jsonl(*LABELS), encoding="utf-8")
    with pytest.raises(ValueError, match=r"checkpoint\.best: expected null without validation data, found val/loss"):
        run(tmp_path / "run", "data=files", f"data.train={file}", "checkpoint.best=val/loss")
