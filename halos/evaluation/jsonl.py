"""Files of JSON lines that grow, and survive a kill in the middle of a line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
