"""Where feedback comes from. A ``data/*.yaml`` names one of these; its constructor's signature is the YAML's schema."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from halos.data.reading.files import Piece, check_streamable, content_key, edges_key, expand, pieces, read_piece
from halos.data.reading.json_files import Located
from halos.data.records.record import Record
from halos.data.records.table import RecordTable, batches
from halos.data.records.truth import TrueReward
from halos.data.sources.formats import Adapted, Adapter
from halos.data.sources.origin import Origin, faults
from halos.data.store.arrow import MEMORY, Part, Store

Files = str | Path | Sequence[str | Path]
"""One file, pattern, folder or hub id (see :func:`halos.data.reading.files.read_rows`), or several."""


@dataclass(frozen=True, slots=True)
class Records:
    """The records of one split, what was left out of it (reason → how often), and the same for each file."""

    records: Sequence[Record]
    dropped: Counter[str]
    origins: dict[str, Origin] = field(default_factory=dict)


class Source(ABC):
    """Training records and, where there are any, validation records.

    ``store``: where sources that read files keep what they made of them.
    """

    name: ClassVar[str]
    store: Store = MEMORY
    whole_trees: bool = False
    """Whether each assistant's turn of a conversation is a completion of a record of its own."""

    @abstractmethod
    def train(self) -> Records: ...

    @abstractmethod
    def val(self) -> Records | None: ...

    def check_stream(self) -> None:  # noqa: B027 (most sources have nothing to check)
        """Raises ``ValueError`` if :meth:`stream` cannot be had without reading everything first."""

    def stream(self, origins: dict[str, Origin], *, strict: bool = False) -> Iterator[Record]:
        """The training records one after the other; what each file gave so far is in ``origins``.

        ``strict`` raises ``ValueError`` for what would be left out because the data are at fault. This one is for
        sources whose records are in memory anyway.
        """
        records = self.train()
        if strict and (found := faults(records.origins)):
            raise ValueError(f"data.strict: expected nothing to leave out; found {found}")
        count, places = len(records.records), {reason: [self.name] for reason in records.dropped}
        origins.update(records.origins or {self.name: Origin(count, count, records.dropped, places)})
        yield from records.records

    def stream_key(self) -> str:
        """A key of what :meth:`stream` gives, quick to have."""
        found = hashlib.sha256()
        for record in self.train().records:
            found.update(repr(record).encode("utf-8", "surrogatepass"))
        return found.hexdigest()

    def true_reward(self) -> TrueReward | None:
        """The true reward, for sources whose world is known."""
        return None


class FileSource(Source):
    """A source that reads rows; a kind of file adds only its adapter.

    ``columns`` renames keys: from the name that the format expects to the one that the files have. ``rows_alone``:
    whether each row makes sense by itself, so that a large file can be read in pieces.
    """

    rows_alone: ClassVar[bool] = False

    def __init__(
        self, train: Files | None, val: Files | None = None, columns: Mapping[str, str | None] | None = None
    ) -> None:
        if train is None or not _paths(train):
            raise ValueError(f"data={self.name} needs data.train=FILE")
        self._train_files = _paths(train)
        self._val_files = _paths(val) if val is not None else []
        self._columns = {ours: theirs for ours, theirs in (columns or {}).items() if theirs is not None}

    @abstractmethod
    def adapted(self, rows: Iterable[Located]) -> Iterator[Adapted]:
        """The records in the rows of one file, of a part of it where ``rows_alone``; see :mod:`.formats`."""

    def adapted_one_by_one(self, rows: Iterable[Located]) -> Iterator[Adapted]:
        """The same for a stream; raises ``ValueError`` for rows that only the whole file makes sense of."""
        return self.adapted(rows)

    def train(self) -> Records:
        return self._read(self._train_files)

    def val(self) -> Records | None:
        return self._read(self._val_files) if self._val_files else None

    def check_stream(self) -> None:
        for file in chain.from_iterable(map(expand, self._train_files)):
            check_streamable(file)

    def stream(self, origins: dict[str, Origin], *, strict: bool = False) -> Iterator[Record]:
        for file in chain.from_iterable(map(expand, self._train_files)):
            origin = origins.setdefault(str(file), Origin())
            rows = _counted(read_piece(Piece(file), self._columns, streaming=True), origin)
            for adapted in self.adapted_one_by_one(rows):
                origin.add(adapted)
                if strict and (found := faults({str(file): origin})):
                    raise ValueError(f"data.strict: expected nothing to leave out; found {found}")
                if adapted[1] is not None:
                    yield adapted[1]
            if not origin.rows:
                raise ValueError(f"{file}: expected at least one row, found an empty file")

    def stream_key(self) -> str:
        files = list(chain.from_iterable(map(expand, self._train_files)))
        told = repr((self.name, self._settings(), list(map(str, files)), list(map(edges_key, files))))
        return hashlib.sha256(told.encode()).hexdigest()

    def _read(self, files: Sequence[str | Path]) -> Records:
        """All records of the files, in order; ``ValueError`` where an id comes twice or no record is left."""
        expanded = list(chain.from_iterable(map(expand, files)))
        split = pieces if self.rows_alone else _whole
        table = self.store.table(self._key(expanded), self._part, [part for file in expanded for part in split(file)])
        origins: dict[str, Origin] = {}
        for notes in table.notes:
            told = {**notes["origin"], "dropped": Counter(notes["origin"]["dropped"])}
            origins.setdefault(notes["file"], Origin()).join(Origin(**told))
        for file, origin in origins.items():
            if not origin.rows:
                raise ValueError(f"{file}: expected at least one row, found an empty file")
        dropped = sum((origin.dropped for origin in origins.values()), Counter())
        if not len(table):
            reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
            raise ValueError(f"{', '.join(origins)}: expected a record to train on; every one was left out: {reasons}")
        records = RecordTable(table)
        check_ids(records)
        return Records(records, dropped, origins)

    def _key(self, files: Sequence[str | Path]) -> str | None:
        """A key of what is in the files and of what this source makes of it; None where that cannot be known."""
        contents = [content_key(file) for file in files]
        with suppress(TypeError, OSError):  # a class that was typed in has no file
            contents.append(content_key(inspect.getfile(type(self))))  # a user's own source lies in a module of theirs
        if None in contents or len(contents) == len(files):
            return None
        told = repr((self.name, self._settings(), list(map(str, files)), contents))
        return hashlib.sha256(told.encode()).hexdigest()[:24]

    def _settings(self) -> dict[str, Any]:
        apart = ("store", "_train_files", "_val_files")
        return {name: value for name, value in sorted(vars(self).items()) if name not in apart}

    def _part(self, piece: Piece) -> Part:
        origin = Origin()

        def records() -> Iterator[tuple[str | None, Record]]:
            for adapted in self.adapted(_counted(read_piece(piece, self._columns), origin)):
                origin.add(adapted)
                where, record, _ = adapted
                if record is not None:
                    yield where, record

        yield from batches(records())
        return {"file": str(piece.file), "origin": {name: getattr(origin, name) for name in Origin.__slots__}}


def check_ids(records: RecordTable) -> None:
    """Raises ``ValueError`` naming both places where two records have one id."""
    names = records.numbers("name")
    _, first = np.unique(names, return_index=True)
    if len(first) == len(names):
        return
    seen: dict[int, int] = {}
    for index in np.flatnonzero(np.isin(names, np.delete(names, first))).tolist():
        before = seen.setdefault(int(names[index]), index)
        if before != index and len({*records.ids((before, index))}) == 1:
            where, name = records.where(index), records.ids([index])[0]
            raise ValueError(f"{where}: expected ids to be unique; found {name!r}, as at {records.where(before)}")


def by_row(rows: Iterable[Located], adapter: Adapter) -> Iterator[Adapted]:
    """The records of a format that has one in each row."""
    for where, row in rows:
        dropped: Counter[str] = Counter()
        yield where, adapter(where, row, dropped), dropped


def _counted(rows: Iterator[Located], origin: Origin) -> Iterator[Located]:
    for located in rows:
        origin.rows += 1
        yield located


def _whole(file: str | Path) -> list[Piece]:
    return [Piece(file)]


def _paths(files: Files) -> list[str | Path]:
    # A list from a YAML is not a ``list``, but iterates like one.
    return [files] if isinstance(files, str | Path) else list(files)
