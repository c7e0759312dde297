"""``metrics.csv``: one line for each time that metrics were logged."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from halos.files import atomic_file


class CSVMetrics(Logger):
    """Metrics as a table whose columns grow as new names appear.

    Lightning's own CSV logger deletes the earlier rows of a run that is resumed; this one goes on with them.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **{name: value for name, value in metrics.items() if name != "epoch"}}
        if not self._columns:
            self._columns = list(next(iter(self._read()), {}))
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._write(self._read())
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self._columns).writerow(row)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def resume_at(self, step: int, *, validated: bool = True) -> None:
        """Keep the rows of an earlier part of this run, up to its checkpoint's step; of that step's validation only
        if it was ``validated`` before the checkpoint."""
        rows = [row for row in self._read() if float(row["step"]) <= step]
        if not validated:
            rows = [row for row in rows if float(row["step"]) < step or not row.get("val/loss")]
        if rows:
            # Columns in the order in which they were first used: those of dropped rows come again.
            self._columns = [name for name in rows[0] if any(row[name] for row in rows)]
            self._write([{name: row[name] for name in self._columns} for row in rows])

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as stream:
            # A last line without an end was cut off.
            return list(csv.DictReader(line for line in stream if line.endswith("\n")))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with atomic_file(self.path) as part, part.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self._columns)
            writer.writeheader()
            writer.writerows(rows)
