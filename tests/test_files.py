"""Files and folders appear complete or not at all."""

import errno
import json
import os
import pwd
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halos import files
from halos.files import (
    Journal,
    atomic_file,
    atomic_folder,
    exclusive,
    link_atomically,
    move_into_place,
    remove,
    write_atomically,
)


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text(name)
    return folder


def plain_name(file: Path) -> str:
    return re.sub(r"^\.(.*)\.[0-9a-f]{16}\.part$", r"\1.part", file.name)


def opened(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def test_a_file_replaces_the_earlier_one(tmp_path: Path) -> None:
    for text in ("earlier", "später"):
        write_atomically(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == text
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_write_that_fails_leaves_the_earlier_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("earlier")

    def fail() -> None:
        with atomic_file(file) as part:
            part.write_text("la")
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert file.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_write_leaves_the_earlier_version_and_does_not_hinder_the_next(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "a"
    code = f"""
import os, signal
from pathlib import Path
from halos import files
with files.atomic_{kind}(Path({str(target)!r})) as part:
    file = part / "b" if {kind == "folder"} else part
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    earlier = fill(target, "b") / "b" if kind == "folder" else target
    earlier.write_text("earlier")
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert sorted(plain_name(file) for file in tmp_path.iterdir()) == ["a", "a.part"]
    assert earlier.read_text() == "earlier"
    if kind == "folder":
        with atomic_folder(target) as part:
            assert list(part.iterdir()) == []
    else:
        write_atomically(target, "later")
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_replaces_the_earlier_one_unless_it_fails(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "model"
    for name in ("earlier", "later"):
        with atomic_folder(folder) as part:
            (part / name).write_text(name)
        assert [file.name for file in folder.iterdir()] == [name]

    def fail() -> None:
        with atomic_folder(folder) as part:
            (part / "half").write_text("")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert [file.name for file in folder.iterdir()] == ["later"]
    assert [file.name for file in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_contents_reach_the_disk_before_the_name_and_the_name_before_the_end(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    replace = Path.replace

    def sync(descriptor: int) -> None:
        steps.append(plain_name(opened(descriptor)))

    def named(self: Path, target: Path) -> Path:
        steps.append("named")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", named)
    if kind == "file":
        write_atomically(tmp_path / "a", "text")
        assert steps == ["a.part", "named", tmp_path.name]
    else:
        with atomic_folder(tmp_path / "a") as part:
            fill(part / "b", "c")
        assert set(steps[:-2]) == {"a.part", "b", "c"}
        assert steps[-2:] == ["named", tmp_path.name]


@pytest.mark.parametrize(("code", "raised"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_only_file_systems_without_fsync_of_folders_are_excused(
    code: int, raised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(descriptor: int) -> None:
        if opened(descriptor).is_dir():
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", sync)
    if raised:
        with pytest.raises(OSError, match=os.strerror(code)):
            write_atomically(tmp_path / "a", "text")
    else:
        write_atomically(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"


def test_processes_that_write_one_file_at_the_same_time_have_parts_of_their_own(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a", shared=True) as one:
        with atomic_file(tmp_path / "a", shared=True) as other:
            other.write_text("other")
        one.write_text("one")
    assert one != other
    assert [file.read_text() for file in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("name", ["a.part", ".a.{}.part"])
@pytest.mark.parametrize("write", [write_atomically, files.link_atomically], ids=["file", "link"])
def test_a_link_at_a_temporary_name_is_not_written_through(
    write: Callable[[Path, Any], None], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / name.format("0" * 16)).symlink_to("victim")
    (tmp_path / "step").write_text("new")
    write(tmp_path / "a", "new" if write is write_atomically else tmp_path / "step")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "a").read_text() == "new"
    # Also if the name were guessed: it is made exclusively.
    (tmp_path / name.format("0" * 16)).unlink(missing_ok=True)
    monkeypatch.setattr(files, "_remove_leftovers", lambda path: None)
    monkeypatch.setattr(files, "_unused_name", lambda path: tmp_path / name)
    (tmp_path / name).symlink_to("victim")
    with pytest.raises(FileExistsError):
        files.atomic_file(tmp_path / "a")
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_modes_follow_the_umask_whatever_a_library_writes(umask: int, tmp_path: Path) -> None:
    earlier = os.umask(umask)
    try:
        with atomic_file(tmp_path / "file") as part:
            part.unlink()
            part.touch(0o600)  # as safetensors does
        with atomic_folder(tmp_path / "folder") as part:
            (part / "file").touch(0o600)
    finally:
        os.umask(earlier)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "file", tmp_path / "folder/file")]
    assert modes == [0o666 & ~umask] * 2
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_a_full_disk_names_the_path(tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        with atomic_file(tmp_path / "card.md"):
            Path("/dev/full").write_text("x" * 100_000)

    with pytest.raises(OSError, match=r"No space left on device: '.*card\.md'"):
        fill_the_disk()


def test_a_home_that_is_not_there_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert files.in_home("~/a") == Path("/home/me/a")
    monkeypatch.delenv("HOME")

    def no_entry(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    assert files.in_home("/a") == Path("/a")
    with pytest.raises(ValueError, match=r"^~/\.cache/halos: expected a home folder for ~, found none; set HOME, or "):
        files.in_home("~/.cache/halos")


def test_a_lock_is_held_by_one_process_and_free_once_that_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    code = f"""
import sys, time, multiprocessing
from pathlib import Path
from halos.files import exclusive
with exclusive(Path({str(file)!r})):
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(3,)).start()  # a worker that lives on
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.read(4) == b"held"
        with pytest.raises(BlockingIOError), exclusive(file):
            pass
        process.kill()
        process.wait()
        with exclusive(file):
            assert file.exists()
    assert not file.exists()


def test_a_link_at_the_locks_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("victim")
    with pytest.raises(OSError, match="symbolic links"), exclusive(tmp_path / "lock"):
        pass
    assert not (tmp_path / "victim").exists()


def test_a_link_names_another_file_or_folder_than_before(tmp_path: Path) -> None:
    (tmp_path / "step_1").write_text("1")
    fill(tmp_path / "step_2", "2")
    for name in ("step_1", "step_2", "step_1", "step_1"):
        link_atomically(tmp_path / "last", tmp_path / name)
        assert (tmp_path / "last").samefile(tmp_path / name)
    assert {file.name for file in tmp_path.iterdir()} == {"last", "step_1", "step_2"}


def test_a_file_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    fill(tmp_path / "a", "b")
    (tmp_path / "a.part").write_text("file")
    move_into_place(tmp_path / "a.part", tmp_path / "a")
    assert (tmp_path / "a").read_text() == "file"


def test_removing_a_link_keeps_what_it_names(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a", "b")
    (tmp_path / "last").symlink_to("a")
    for path in (tmp_path / "last", tmp_path / "none"):
        remove(path)
    assert list(tmp_path.iterdir()) == [folder]
    remove(folder)
    assert not list(tmp_path.iterdir())


def test_a_journal_goes_on_behind_what_a_kill_left(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.jsonl"
    Journal(file).append({"n": 1})
    file.write_bytes(file.read_bytes() + b'{"n": 2')
    journal = Journal(file)
    assert journal.rows == [{"n": 1}]
    journal.append({"n": "ü"})
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [{"n": 1}, {"n": "ü"}]
    file.write_text('{"n": 1}\n3\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: expected a JSON object, found b'3'"):
        Journal(file)


def test_a_journals_lines_and_its_name_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(opened(descriptor).name))
    journal = files.Journal(tmp_path / "a.jsonl")
    journal.append({})
    journal.append({})
    assert synced == ["a.jsonl", tmp_path.name, "a.jsonl"]
