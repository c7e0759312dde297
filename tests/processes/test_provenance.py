"""The command line of a run, and the commit of the folder in which it is called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from halos.processes.provenance import LINE, called_by, command_line, git_commit


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_working_folder_and_says_whether_files_were_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None  # there is no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "one")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "b").write_text("a file that git does not know")
    assert git_commit(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    assert git_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert git_commit() is None


def test_a_line_holds_inside_its_block_and_in_processes_that_are_started_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LINE, raising=False)
    with called_by("halos train"):
        with called_by("halos train seed=1"):
            assert command_line() == os.environ[LINE] == "halos train seed=1"
        assert command_line() == "halos train"
    assert command_line() is None
