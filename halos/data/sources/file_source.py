"""Sources that read files: all rows into a table of records, or one row after the other as a stream."""

from __future__ import annotations

import hashlib
import inspect
import sys
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import ClassVar

import numpy as np

from halos.checks import check_mapping, check_whole
from halos.data.reading.fields import RawRow
from halos.data.reading.files import (
    Piece,
    check_streamable,
    content_key,
    edges_key,
    expand,
    pieces,
    read_piece,
    reads_at_once,
)
from halos.data.reading.json_files import Located, MalformedRow
from halos.data.reading.lines import ReadingLimits
from halos.data.records.adapted import BAD_ROW, COUNTERS, Adapted, FileCounts, check_faultless
from halos.data.records.record import Record, prompt_characters
from halos.data.records.table import RecordTable, batches
from halos.data.sources.base import Records, Source
from halos.data.store.arrow import Part

Files = str | Path | Sequence[str | Path]
"""One file, pattern, folder or hub id (see :class:`halos.data.reading.files.Piece`), or several."""
Columns = Mapping[str, str | None] | None
"""Maps the name of a key that a format expects to its name in the files; None keeps the expected name."""


FIRST_ROWS = 100
"""Rows of each file that are read before a run imports torch, which takes seconds."""


class FileSource(Source):
    """A source that reads rows from files; each format adds its adapter.

    Args:
        train: files of training data.
        val: files of validation data.
        columns: maps the name of a key that the format expects to its name in the files.
        bad_rows: ``stop`` at the first malformed row; ``skip`` counts malformed rows and leaves them out.
        max_bad_rows: with ``bad_rows=skip``, more malformed rows than this in one file are an error.

    Attributes:
        rows_alone: whether each row can be read without the others, so that a large file can be read in pieces.

    Raises:
        ValueError: if there is no training file, or a setting has an unknown value.
    """

    # False unless a format sets it: a file whose rows belong together could be cut between them without any error.
    rows_alone: ClassVar[bool] = False

    def __init__(
        self,
        train: Files | None,
        val: Files | None = None,
        columns: Columns = None,
        bad_rows: str = "stop",
        max_bad_rows: int = 100,
    ) -> None:
        check_whole("data.max_bad_rows", max_bad_rows, 0)
        if bad_rows not in ("stop", "skip"):
            raise ValueError(f"data.bad_rows: expected stop or skip, found {bad_rows!r}")
        self._max_bad_rows = max_bad_rows if bad_rows == "skip" else None
        self._train_files, self._val_files = _paths("train", train), _paths("val", val)
        if not self._train_files:
            raise ValueError(f"data={self.name} needs data.train=FILE")
        check_mapping("data.columns", columns)
        self._columns = {ours: theirs for ours, theirs in (columns or {}).items() if theirs is not None}

    @abstractmethod
    def adapted(self, rows: Iterable[Located]) -> Iterator[Adapted]:
        """Adapt the rows of one file, or of a piece of it where ``rows_alone``; see :mod:`.adapted`."""

    def rows(self, piece: Piece, *, streaming: bool = False) -> Iterator[Located]:
        """Read the rows of a piece; see :func:`.read_piece`."""
        return read_piece(piece, self._columns, streaming=streaming, keep_malformed=self._max_bad_rows is not None)

    def each_row(self, rows: Iterable[Located], adapt: Callable[[str, RawRow], Iterable[Adapted]]) -> Iterator[Adapted]:
        """Adapt rows one by one; with ``bad_rows=skip`` malformed ones are counted.

        Args:
            rows: the rows.
            adapt: adapts one row, given its location.
        """
        for where, row in rows:
            try:
                if isinstance(row, MalformedRow):
                    raise row.error
                records = list(adapt(where, row))
                if self._max_bad_rows is not None:  # a record that is too long counts as malformed; else see _added()
                    for place, record, _ in records:
                        check_length(place, record, self.reading)
            except ValueError:
                if self._max_bad_rows is None:
                    raise
                records = [(where, None, Counter({BAD_ROW: 1}))]
            yield from records

    def check_origin(self, file: str, origin: FileCounts) -> None:
        """Raise ``ValueError`` if what was read from a file is not acceptable as a whole."""
        if not origin.rows:
            raise ValueError(f"{file}: expected at least one row, found an empty file")
        count = origin.dropped[BAD_ROW]
        if self._max_bad_rows is not None and count > self._max_bad_rows:
            raise ValueError(
                f"{file}: expected up to data.max_bad_rows = {self._max_bad_rows} malformed rows, found {count}, "
                f"the first at {', '.join(origin.places[BAD_ROW])}; data.bad_rows=stop shows the first error"
            )

    def combined(self, records: RecordTable, origins: dict[str, FileCounts]) -> RecordTable:
        """Change the records of a split where that needs all of them, such as votes on one reply in several rows.

        Most formats change nothing.

        Args:
            records: the records of all files.
            origins: the counts of each file, which are updated.
        """
        return records

    def adapted_one_by_one(self, rows: Iterable[Located]) -> Iterator[Adapted]:
        """Adapt the rows of a stream; raise ``ValueError`` for rows that need the whole file."""
        return self.adapted(rows)

    def train(self) -> Records:
        return self._read(self._train_files)

    def val(self) -> Records | None:
        return self._read(self._val_files) if self._val_files else None

    def files(self) -> Iterator[str | Path]:
        """Yield the files, folders and hub ids of training data."""
        return chain.from_iterable(map(expand, self._train_files))

    def check_first_rows(self) -> None:
        for file in chain.from_iterable(map(expand, (*self._train_files, *self._val_files))):
            if not reads_at_once(file):
                continue
            origin = FileCounts()
            first = islice(self.rows(Piece(file, expansion=self.reading.max_expansion)), FIRST_ROWS)
            rows = _counted(first, origin)
            # Rows that belong together cannot be adapted without the rest of the file, so they are only read.
            for _ in _added(self.adapted(rows), origin, self.reading) if self.rows_alone else rows:
                pass
            if not origin.rows:
                self.check_origin(str(file), origin)

    def check_stream(self) -> None:
        for file in self.files():
            check_streamable(file)

    def stream(self, origins: dict[str, FileCounts], *, strict: bool = False) -> Iterator[Record]:
        for file in self.files():
            origin = origins.setdefault(str(file), FileCounts())
            rows = _counted(self.rows(Piece(file, expansion=self.reading.max_expansion), streaming=True), origin)
            for _, record in _added(self.adapted_one_by_one(rows), origin, self.reading):
                if strict:
                    check_faultless({str(file): origin})
                if record is not None:
                    yield record
            self.check_origin(str(file), origin)

    def stream_key(self) -> str:
        files = list(self.files())
        # The contents of a large data set are not read for its key: a stream has to begin at once.
        content = (self.name, self._settings(), list(map(str, files)), list(map(edges_key, files)))
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def _read(self, files: Sequence[str | Path]) -> Records:
        """Read all records of the files, in order.

        Raises:
            ValueError: if an id occurs twice or no record is left.
        """
        expanded = list(chain.from_iterable(map(expand, files)))
        divided = partial(pieces, divide=self.rows_alone, expansion=self.reading.max_expansion)
        tasks = [piece for file in expanded for piece in divided(file)]
        table = self.store.table(self._key(expanded), self._part, tasks)
        # Each piece of a file has its own counts, perhaps from another process or an earlier run. They are added here.
        origins: dict[str, FileCounts] = {}
        for notes in table.notes:
            counts = {**notes["origin"], **{name: Counter(notes["origin"][name]) for name in COUNTERS}}
            origins.setdefault(notes["file"], FileCounts()).join(FileCounts(**counts))
        for file, origin in origins.items():
            self.check_origin(file, origin)
        records = RecordTable(table)
        check_ids(records)
        records = self.combined(records, origins)
        dropped = sum((origin.dropped for origin in origins.values()), Counter())
        if not len(records):
            reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
            raise ValueError(f"{', '.join(origins)}: expected a record to train on; every one was left out: {reasons}")
        return Records(records, dropped, origins)

    def _key(self, files: Sequence[str | Path]) -> str | None:
        """Return a cache key of the files' contents and of this source's settings and code; None if it cannot be
        computed."""
        contents = [*map(content_key, files), *_user_code(type(self))]
        if None in contents:
            return None
        key = repr((self.name, self._settings(), list(map(str, files)), contents))
        return hashlib.sha256(key.encode()).hexdigest()[:24]

    def _settings(self) -> dict[str, object]:
        # The key has the files' contents already. Any other attribute that a constructor sets may change the records.
        not_settings = ("store", "reading", "_train_files", "_val_files")
        return {name: value for name, value in sorted(vars(self).items()) if name not in not_settings}

    def _part(self, piece: Piece) -> Part:
        origin = FileCounts()
        adapted = self.adapted(_counted(self.rows(piece), origin))
        # The counts in ``origin`` are complete only after the last batch.
        added = _added(adapted, origin, self.reading)
        yield from batches((where, record) for where, record in added if record is not None)
        return {"file": str(piece.file), "origin": {name: getattr(origin, name) for name in FileCounts.__slots__}}


class RowSource(FileSource):
    """A source whose files have one record in each row."""

    rows_alone = True

    @abstractmethod
    def record(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        """Make a record of a row.

        Args:
            where: the location of the row.
            row: the row.
            dropped: counts what is left out, by reason.

        Returns:
            The record; None for a well-formed row with nothing to learn from, whose reason is counted in ``dropped``.

        Raises:
            ValueError: for a malformed row.
        """

    def adapted(self, rows: Iterable[Located]) -> Iterator[Adapted]:
        return self.each_row(rows, self._adapted_row)

    def _adapted_row(self, where: str, row: RawRow) -> Iterator[Adapted]:
        dropped: Counter[str] = Counter()
        yield where, self.record(where, row, dropped), dropped


def _user_code(source: type[FileSource]) -> Iterator[str | None]:
    """Yield a content key of each user module that defines the class or a base of it; None for one without a file.

    halos' own classes are covered by the format number of prepared data (:data:`.PREPARED_FORMAT`). A user's classes
    have no such number, so the contents of their modules are part of the key.
    """
    for cls in source.__mro__:
        package = cls.__module__.partition(".")[0]
        if package == "halos" or package in sys.stdlib_module_names:
            continue
        try:
            yield content_key(inspect.getfile(cls))
        except (TypeError, OSError):  # a class that was defined in an interactive session
            yield None


def check_ids(records: RecordTable) -> None:
    """Raise ``ValueError`` if two records have the same id; the error names both places."""
    names = records.numbers("name")
    _, first = np.unique(names, return_index=True)
    # Names are digests of ids. Very rarely, two different ids have the same digest.
    seen: dict[int, int] = {}
    for index in np.flatnonzero(np.isin(names, np.delete(names, first))).tolist():
        before = seen.setdefault(int(names[index]), index)
        if before != index and len({*records.ids((before, index))}) == 1:
            where, name = records.where(index), records.ids([index])[0]
            raise ValueError(f"{where}: expected ids to be unique; found {name!r}, as at {records.where(before)}")


def _counted(rows: Iterator[Located], origin: FileCounts) -> Iterator[Located]:
    for located in rows:
        origin.rows += 1
        yield located


def _added(
    adapted: Iterable[Adapted], origin: FileCounts, limits: ReadingLimits
) -> Iterator[tuple[str, Record | None]]:
    """Yield locations and records, each after its counts were added: they include what the caller is working on."""
    for where, record, dropped in adapted:
        check_length(where, record, limits)
        origin.records += record is not None
        if dropped:
            origin.drop(where, dropped)
        yield where, record


def check_length(where: str, record: Record | None, limits: ReadingLimits) -> None:
    """Raise ``ValueError`` for a record that is longer than the limit."""
    if record is None:
        return
    characters = prompt_characters(record.prompt) + sum(len(completion.text) for completion in record.completions)
    if characters > limits.max_characters:
        expected = f"expected a record of up to data.max_characters = {limits.max_characters:,} characters"
        raise ValueError(f"{where}: {expected}, found {characters:,}")


def _paths(name: str, files: Files | None) -> list[str | Path]:
    # Not only a ``list``: omegaconf has a list type of its own.
    if files is None or isinstance(files, str | Path):
        return [files] if files else []
    if not isinstance(files, Sequence) or not all(isinstance(file, str | Path) for file in files):
        raise ValueError(f"data.{name}: expected a file or a list of files, found {files!r}")
    return list(files)
