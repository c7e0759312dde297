"""Who may use a run's folder, and files that appear whole or not at all."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from halos.training.run_folder import CONTENTS, RunFolder, held


def fill(root: Path, *names: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        if "." in name:
            (root / name).write_text("old")
        else:
            (root / name).mkdir()
            (root / name / "old").write_text("old")


def whole_checkpoint(file: Path) -> Path:
    """Something that has the outside of a checkpoint."""
    file.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"")
    file.write_bytes(buffer.getvalue())
    return file


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    assert folder.check(resume=None, overwrite=False) is None
    assert not folder.root.exists()
    folder.open("seed: 0\n", fresh=True)
    assert (tmp_path / "a" / "b" / "config.yaml").read_text() == "seed: 0\n"


@pytest.mark.parametrize("name", ["checkpoints", "model", "metrics.csv", "summary.json"])
def test_a_folder_that_holds_a_run_is_refused(name: str, tmp_path: Path) -> None:
    fill(tmp_path, name)
    with pytest.raises(ValueError, match=f"output_dir: .*another run \\({name}\\).* resume=auto .* overwrite=true"):
        RunFolder(tmp_path).check(resume=None, overwrite=False)
    assert (tmp_path / name).exists()


def test_what_does_not_belong_to_a_run_is_no_obstacle_and_is_kept(tmp_path: Path) -> None:
    fill(tmp_path, "notes.txt", "data", "mymodule.py")
    RunFolder(tmp_path).check(resume=None, overwrite=False)
    RunFolder(tmp_path).open("", fresh=True)
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "data", "mymodule.py", "config.yaml"}


def test_overwriting_removes_a_runs_contents_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path, *CONTENTS, "notes.txt", "data")
    assert RunFolder(tmp_path).check(resume=None, overwrite=True) is None
    assert {file.name for file in tmp_path.iterdir()} == {*CONTENTS, "notes.txt", "data"}, "checking removes nothing"
    RunFolder(tmp_path).open("new", fresh=True)
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "data", "config.yaml"}
    assert (tmp_path / "config.yaml").read_text() == "new"
    assert (tmp_path / "data" / "old").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_resuming_goes_on_from_the_last_checkpoint_and_removes_nothing(overwrite: bool, tmp_path: Path) -> None:
    fill(tmp_path, "config.yaml", "metrics.csv", "model")
    last = whole_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert RunFolder(tmp_path).check(resume="auto", overwrite=overwrite) == last
    RunFolder(tmp_path).open("", fresh=False)
    assert {file.name for file in tmp_path.iterdir()} == {"config.yaml", "metrics.csv", "model", "checkpoints"}


def test_resume_auto_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "new").check(resume="auto", overwrite=False) is None
    fill(tmp_path, "config.yaml")
    assert RunFolder(tmp_path).check(resume="auto", overwrite=False) is None


def test_a_complete_run_without_its_checkpoints_is_not_made_anew(tmp_path: Path) -> None:
    fill(tmp_path, "model", "summary.json")
    with pytest.raises(ValueError, match=r"^resume=auto: .* whose checkpoints are gone; .* overwrite=true"):
        RunFolder(tmp_path).check(resume="auto", overwrite=False)
    assert RunFolder(tmp_path).check(resume="auto", overwrite=True) is None


def test_a_checkpoint_can_be_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    file = whole_checkpoint(folder.checkpoints / "step_2.ckpt")
    fill(folder.root, "metrics.csv")
    assert folder.check(resume=str(file), overwrite=False) == file
    assert folder.owns(file)


def test_a_run_is_not_written_over_by_one_that_goes_on_from_elsewhere(tmp_path: Path) -> None:
    file = whole_checkpoint(tmp_path / "elsewhere" / "step_2.ckpt")
    folder = RunFolder(tmp_path / "run")
    assert folder.check(resume=str(file), overwrite=False) == file
    assert not folder.owns(file)
    fill(folder.root, "metrics.csv")
    with pytest.raises(ValueError, match=r"^output_dir: .* holds another run \(metrics\.csv\)"):
        folder.check(resume=str(file), overwrite=False)
    assert folder.check(resume=str(file), overwrite=True) == file


@pytest.mark.parametrize("value", [True, 3])
def test_what_is_no_path_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^resume: expected 'auto' or a checkpoint's path, found {value}"):
        RunFolder(tmp_path).check(resume=value, overwrite=False)  # type: ignore[arg-type]


def test_a_named_checkpoint_must_exist_and_the_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume: expected 'auto' or a checkpoint's path, found .*no\.ckpt"):
        RunFolder(tmp_path / "run").check(resume=str(tmp_path / "no.ckpt"), overwrite=True)
    assert not (tmp_path / "run").exists()


def test_only_the_first_process_touches_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    fill(tmp_path / "old", "metrics.csv")  # by now the first process may have written
    RunFolder(tmp_path / "old").check(resume=None, overwrite=False)
    RunFolder(tmp_path / "old").open("a: 1", fresh=True)
    RunFolder(tmp_path / "new").open("a: 1", fresh=True)
    assert {file.name for file in (tmp_path / "old").iterdir()} == {"metrics.csv"}
    assert not (tmp_path / "new").exists()


def test_files_replace_earlier_ones_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for text in ("a: 1\n", "b: 'ü'\n"):
        folder.open(text, fresh=False)
        assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == text
    folder.write_summary({"steps": 3})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 3}
    assert {file.name for file in tmp_path.iterdir()} == {"config.yaml", "summary.json"}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_summary_that_is_no_json_is_not_written(number: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunFolder(tmp_path).write_summary({"metrics": {"loss": number}})
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, time
from halos.training.run_folder import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_belongs_to_one_run_until_that_has_ended(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE) as other:
        assert other.stdout.read(4) == b"held"
        with pytest.raises(ValueError, match=r"^output_dir: .*run is in use by another run"), held(f"{tmp_path}/run"):
            pass
        other.kill()
        other.wait()
    with held(f"{tmp_path}/run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_other_processes_of_the_run_do_not_wait_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with held(str(tmp_path / "run")):
        assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        with pytest.raises(ValueError, match=f"^output_dir: .*can be written, found .*{reason}"), held(str(place)):
            pass
    with pytest.raises(ValueError, match=r"^output_dir: .*can be written, found /proc/run"), held("/proc/run"):
        pass
