"""Files that are written whole or not at all, and journals that survive a kill."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A place to write to, which takes the folder's name (and place) only if all went well."""
    part = folder.with_name(folder.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    yield part
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)


class Journal:
    """An append-only file of JSON objects; each is on disk when :meth:`append` returns.

    Opening it cuts off a last line that a kill left unfinished. Raises ``ValueError`` for any other line that is not a
    JSON object, as the file is then something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._recover()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one object; not a step further before it is on disk."""
        with self.path.open("ab") as stream:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.rows.append(dict(row))

    def _recover(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{self.path}:{number}: expected a JSON object, found {line[:60]!r}")
            self.rows.append(row)
