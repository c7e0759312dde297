"""Where feedback comes from. A ``data/*.yaml`` names one of these; its constructor's signature is the YAML's schema."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

from halos.data.feedback import Feedback
from halos.data.fields import Row
from halos.data.files import read_rows
from halos.data.formats import Adapter, to_record
from halos.data.hh import hh_record
from halos.data.judge import Judge

Files = str | Path | Sequence[str | Path]
"""One file or hub id (see :func:`halos.data.files.read_rows`), or several."""


@dataclass(frozen=True, slots=True)
class Records:
    """The records of one split, and what was left out of it: reason → how often."""

    records: list[Feedback]
    dropped: Counter[str]


class Source(ABC):
    """Training records and, where there are any, validation records."""

    name: ClassVar[str]

    @abstractmethod
    def train(self) -> Records: ...

    @abstractmethod
    def val(self) -> Records | None: ...

    def judge(self) -> Judge | None:
        """The true reward, for sources whose world is known."""
        return None


class FileSource(Source):
    """A source that reads rows; a kind of file adds only its adapter."""

    def __init__(self, train: Files | None, val: Files | None = None) -> None:
        if train is None or not _paths(train):
            raise ValueError(f"data={self.name} needs data.train=FILE")
        self._train_files = _paths(train)
        self._val_files = _paths(val) if val is not None else []

    @abstractmethod
    def adapt(self, where: str, row: Row, dropped: Counter[str]) -> Feedback | None:
        """The record in one row; see :mod:`halos.data.formats`."""

    def train(self) -> Records:
        return read_records(self._train_files, self.adapt)

    def val(self) -> Records | None:
        return read_records(self._val_files, self.adapt) if self._val_files else None


@final
class JsonSource(FileSource):
    """Files in this project's format, TRL's, HALOs' or UltraFeedback's, recognised row by row."""

    name = "json"

    def adapt(self, where: str, row: Row, dropped: Counter[str]) -> Feedback | None:
        return to_record(where, row, dropped)


@final
class HHSource(FileSource):
    """Transcripts in the format of Anthropic's HH-RLHF; ``Anthropic/hh-rlhf:test`` is its test split."""

    name = "hh"

    def __init__(self, train: Files | None = "Anthropic/hh-rlhf:train", val: Files | None = None) -> None:
        super().__init__(train, val)

    def adapt(self, where: str, row: Row, dropped: Counter[str]) -> Feedback | None:
        return hh_record(where, row, dropped)


def read_records(paths: Sequence[str | Path], adapt: Adapter) -> Records:
    """All records of ``paths``, in order; ``ValueError`` where an id comes twice or no record is left."""
    records: list[Feedback] = []
    dropped: Counter[str] = Counter()
    seen: dict[str, str] = {}
    for path in paths:
        for where, row in read_rows(path):
            record = adapt(where, row, dropped)
            if record is None:
                continue
            if record.id in seen:
                raise ValueError(f"{where}: expected ids to be unique; found {record.id!r}, as at {seen[record.id]}")
            seen[record.id] = where
            records.append(record)
    if not records:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
        raise ValueError(
            f"{', '.join(map(str, paths))}: expected a record to train on; every one was left out: {reasons}"
        )
    return Records(records, dropped)


def _paths(files: Files) -> list[str | Path]:
    # A list from a YAML is not a ``list``, but iterates like one.
    return [files] if isinstance(files, str | Path) else list(files)
