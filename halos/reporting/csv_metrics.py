"""Writes ``metrics.csv``: a row for each time that metrics are logged."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from halos.files import atomic_file, path_named


class CSVMetrics(Logger):
    """Writes metrics to a CSV file, which gets a new column for each new name.

    Lightning's own CSV logger deletes the earlier rows when a run is resumed. This one keeps them.
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
        # Lightning adds the epoch to every call, and a run is one epoch.
        row = {"step": step, **{name: value for name, value in metrics.items() if name != "epoch"}}
        if not self._columns:
            self._columns = list(next(iter(self._read()), {}))
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            # The header is the first line, so a new column means a new file.
            self._write(self._read())
        with path_named(self.path), self.path.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self._columns).writerow(row)

    @rank_zero_only
    def log_hyperparams(self, params: object, *args: object, **kwargs: object) -> None:
        """Do nothing, because parameters are in config.yaml."""

    @rank_zero_only
    def resume_at(self, step: int, *, validated: bool = True) -> None:
        """Remove the rows that a run which resumes at ``step`` will log again.

        Args:
            step: optimizer step of the checkpoint.
            validated: whether the step was validated before the checkpoint was written. If not, the row of its
                validation is also removed.
        """
        rows = [row for row in self._read() if float(row["step"]) <= step]
        if not validated:
            rows = [row for row in rows if float(row["step"]) < step or not row.get("val/loss")]
        if rows:
            # Columns that only removed rows have used are also removed. They will be added again, in the same order as
            # in an uninterrupted run.
            self._columns = [name for name in rows[0] if any(row[name] for row in rows)]
            self._write([{name: row[name] for name in self._columns} for row in rows])

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as stream:
            # A last line without a line break was cut off by a kill.
            return list(csv.DictReader(line for line in stream if line.endswith("\n")))

    def _write(self, rows: list[dict[str, str]]) -> None:
        with atomic_file(self.path) as part, part.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self._columns)
            writer.writeheader()
            writer.writerows(rows)
