"""How a run was started: its command line, and the commit of the folder in which it was called."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LINE = "HALOS_COMMAND_LINE"
"""Environment variable: the command line of a run, for the processes of its ranks."""


@contextmanager
def called_by(line: str) -> Iterator[None]:
    """Let :func:`command_line` return this line inside the block, in this process and in those that it starts."""
    before = os.environ.get(LINE)
    os.environ[LINE] = line
    try:
        yield
    finally:
        if before is None:
            del os.environ[LINE]
        else:
            os.environ[LINE] = before


def command_line() -> str | None:
    """Return how the run was started: a shell command or a call in Python; None if this was not recorded."""
    return os.environ.get(LINE)


def git_commit(folder: Path | None = None) -> str | None:
    """Return the commit of the repository that a folder is in, with ``-dirty`` if tracked files were changed.

    Args:
        folder: None: the working folder.

    Returns:
        None outside of a repository, without a commit, or without git.
    """
    # Without tags, whose names would take the place of the hash.
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(  # noqa: S603 (fixed words, and no shell)
            words, cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
