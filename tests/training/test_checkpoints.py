"""Which checkpoint a run goes on from, and which is refused."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed.checkpoint

from halos.training.checkpoints import IDENTITY, Checkpoints, LocalCheckpointIO, check_identity, check_intact, newest
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
    with pytest.raises(ValueError, match="none or incomplete"):
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
    with pytest.raises(ValueError, match="checkpoint_every: expected a whole number from 1 on"):
        Checkpoints(tmp_path, every=every, identity={}, record=RunRecord())
