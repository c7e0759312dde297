"""Which checkpoint a run goes on from, and which is refused."""

import math
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed.checkpoint

from halos.processes import signals
from halos.training.checkpoint_files import IDENTITY, check_identity, check_intact, newest
from halos.training.checkpoints import Checkpoints, LocalCheckpointIO
from halos.training.record import RunRecord
from halos.training.run_folder import RunFolder


def save(file: Path, age: int = 0, **identity: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"w": torch.arange(1000.0)}, IDENTITY: identity}, file)
    os.utime(file, (1_000_000 - age, 1_000_000 - age))
    return file


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def test_the_newest_checkpoint_is_found_and_last_is_its_name(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    save(tmp_path / "step_2.ckpt", age=2)
    four = save(tmp_path / "step_4.ckpt", age=1)
    assert newest(tmp_path) == four  # killed before the link was there
    os.link(four, tmp_path / "last.ckpt")
    assert newest(tmp_path) == tmp_path / "last.ckpt"
    assert newest(tmp_path) == tmp_path / "last.ckpt"
    six = save(tmp_path / "step_6.ckpt")
    assert newest(tmp_path) == six  # killed before the link was moved


def test_the_newest_checkpoint_is_that_of_the_latest_step_whatever_the_times_say(tmp_path: Path) -> None:
    save(tmp_path / "step_8.ckpt", age=1)
    save(tmp_path / "last.ckpt", age=3)  # a copy of a folder has a file in place of the link
    ten = save(tmp_path / "step_10.ckpt", age=2)
    assert newest(tmp_path) == ten
    flip(ten)
    assert newest(tmp_path) == tmp_path / "last.ckpt"


def test_earlier_checkpoints_are_removed_whatever_the_times_say(tmp_path: Path) -> None:
    callback = Checkpoints(tmp_path, every=1, identity={}, record=Mock())
    trainer = Mock(is_global_zero=True, loggers=[], save_checkpoint=save)
    for step in (8, 9, 10, 11):
        trainer.global_step = step
        callback.save(trainer)
        os.utime(tmp_path / f"step_{step}.ckpt", (3_000_000_000 - step, 3_000_000_000 - step))  # a clock that is ahead
    assert {file.name for file in tmp_path.iterdir()} == {"step_10.ckpt", "step_11.ckpt", "last.ckpt"}
    trainer.global_step = 10  # resumed at step 9: what came after it is another run's future
    callback.save(trainer)
    assert {file.name for file in tmp_path.iterdir()} == {"step_10.ckpt", "last.ckpt"}


@pytest.mark.parametrize(("keep", "kept"), [(1, {4}), (3, {2, 3, 4}), (None, {1, 2, 3, 4})])
def test_so_many_of_the_newest_are_kept(keep: int | None, kept: set[int], tmp_path: Path) -> None:
    callback = Checkpoints(tmp_path, every=1, keep=keep, identity={}, record=Mock())
    for step in (1, 2, 3, 4):
        callback.save(Mock(is_global_zero=True, loggers=[], save_checkpoint=save, global_step=step))
    assert {file.name for file in tmp_path.iterdir()} == {*(f"step_{step}.ckpt" for step in kept), "last.ckpt"}


class Validated:
    """A run that saves and then validates, with the value of a metric at each step."""

    def __init__(self, folder: Path, metric: str) -> None:
        self.record = RunRecord()
        self.callback = Checkpoints(folder, every=100, keep=1, best=metric, identity={}, record=self.record)
        self.name = metric.removeprefix("val/")

    def step(self, step: int, **metrics: float) -> None:
        trainer = Mock(is_global_zero=True, loggers=[], save_checkpoint=save, global_step=step)
        trainer.strategy.broadcast = lambda value: value
        trainer.lightning_module.take_losses.return_value = []
        if step:
            self.callback.save(trainer)
        self.record.validations.append((step, metrics))
        self.callback.on_validation_end(trainer, Mock())


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("val/auc", (9.0, 0.6, 0.8, 0.8, 0.7), 2),  # that of step 0 has no checkpoint; the first of equals
        ("val/loss", (0.1, 0.6, 0.4, 0.5, 0.7), 2),
        ("val/kl", (0.0, 0.6, 0.4, 0.5, 0.1), 4),
        ("val/auc", (0.5, math.nan, 0.4, math.inf, 0.3), 2),
    ],
)
def test_the_checkpoint_of_the_best_validation_is_kept_beside_the_newest(
    metric: str, values: tuple[float, ...], best: int, tmp_path: Path
) -> None:
    run = Validated(tmp_path, metric)
    for step, value in enumerate(values):
        run.step(step, **{run.name: value})
    run.step(5)  # a validation that did not sample replies
    assert run.callback.best == (best, values[best])
    names = {f"step_{best}.ckpt", "step_5.ckpt", "last.ckpt", "best.ckpt"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert (tmp_path / "best.ckpt").samefile(tmp_path / f"step_{best}.ckpt")


def test_the_best_is_known_after_a_resume_and_forgotten_where_its_checkpoint_is_not_there(tmp_path: Path) -> None:
    first = Validated(tmp_path / "a", "val/auc")
    for step, value in ((1, 0.9), (2, 0.8)):
        first.step(step, auc=value)
    trainer = Mock(early_stopping_callbacks=[], global_step=2)
    trainer.strategy.broadcast = lambda value: value
    trainer.fit_loop._data_fetcher = None
    for folder, best in (("a", (1, 0.9)), ("b", None)):
        resumed = Validated(tmp_path / folder, "val/auc")
        resumed.callback.load_state_dict(first.callback.state_dict())
        resumed.callback.on_train_start(trainer, Mock())
        assert resumed.callback.best == best
    signals.defer(False)


def test_a_metric_that_is_none_of_validation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.best: expected a metric of validation, such as val/loss, found"):
        Validated(tmp_path, "train/loss")
    with pytest.raises(ValueError, match=r"checkpoint\.keep: expected a whole number from 1 on or null, found 0"):
        Checkpoints(tmp_path, every=1, keep=0, identity={}, record=RunRecord())


def test_a_link_at_a_checkpoints_temporary_name_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    for name in ("a.ckpt.part", "step_2.ckpt.part"):
        (tmp_path / name).symlink_to("victim")
    with pytest.raises(FileExistsError):
        LocalCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt.part")
    trainer = Mock(is_global_zero=True, loggers=[], global_step=2, save_checkpoint=save)
    Checkpoints(tmp_path, every=1, identity={}, record=Mock()).save(trainer)
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "step_2.ckpt").is_symlink()


@pytest.mark.parametrize("damage", [flip, cut, empty])
def test_a_damaged_checkpoint_is_passed_over_or_refused(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two, four = save(tmp_path / "step_2.ckpt", age=2), save(tmp_path / "step_4.ckpt", age=1)
    damage(four)
    os.utime(four)
    assert newest(tmp_path) == two
    assert "step_4.ckpt" in caplog.text
    with pytest.raises(ValueError, match=r"resume: .*step_4\.ckpt, which is damaged"):
        check_intact(four)
    damage(two)
    with pytest.raises(ValueError, match=r"step_4\.ckpt.*step_2\.ckpt|step_2\.ckpt.*step_4\.ckpt"):
        newest(tmp_path)


def test_a_sharded_checkpoint_is_whole_with_its_last_file(tmp_path: Path) -> None:
    folder = tmp_path / "step_2.ckpt"
    torch.distributed.checkpoint.save({"weight": torch.zeros(2)}, checkpoint_id=folder, no_dist=True)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="not one or is incomplete"):
        check_intact(folder)
    save(folder / "meta.pt")
    check_intact(folder)
    assert newest(tmp_path) == folder


def test_half_written_checkpoints_are_removed_and_never_found(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    two = save(run.checkpoints / "step_1.ckpt")
    (run.checkpoints / "step_2.ckpt.part").write_bytes(b"half")
    (run.checkpoints / "step_4.ckpt.part").mkdir()
    assert newest(run.checkpoints) == two
    run.open("", fresh=False)
    assert list(run.checkpoints.iterdir()) == [two]


class Command:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.file),))


@pytest.mark.parametrize("key", ["state_dict", IDENTITY])
def test_a_checkpoint_file_runs_nothing(key: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, IDENTITY: {}, key: Command(tmp_path / "ran")}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"^resume: expected a checkpoint of this program, found .*a\.ckpt"):
        check_identity(tmp_path / "a.ckpt", {})
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_run_is_refused_with_each_key_that_differs(tmp_path: Path) -> None:
    file = save(tmp_path / "a.ckpt", seed=0, loss="kto", old=1)
    check_identity(file, {"seed": 0, "loss": "kto", "old": 1})
    with pytest.raises(ValueError, match="belongs to another run") as caught:
        check_identity(file, {"seed": 1, "loss": "kto", "new": 2})
    assert "seed: 0 in the checkpoint, 1 now; old: 1 in the checkpoint, none now; new: none in the checkpoint" in str(
        caught.value
    )
    torch.save({"state_dict": {}}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"expected a checkpoint of this program, found .*b\.ckpt"):
        check_identity(tmp_path / "b.ckpt", {})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    LocalCheckpointIO().save_checkpoint({"w": torch.ones(3)}, tmp_path / "a.ckpt")
    check_intact(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_steps_between_checkpoints_are_a_whole_number(every: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.every: expected a whole number from 1 on"):
        Checkpoints(tmp_path, every=every, identity={}, record=RunRecord())
