"""Arrow tables: record batches one after the other, memory-mapped where they lie on disk.

    FOLDER/data/<key>/00000.arrow, 00001.arrow, …, notes.json

A table is built in a folder beside its place, under a lock, and moved there whole: a folder with its name is complete,
what an interrupted build leaves is not looked at and makes way for the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from operator import eq
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
import tokenizers
import transformers

from halos.data.store.parallel import mapped
from halos.files import atomic_folder

log = logging.getLogger(__name__)

T = TypeVar("T")

NOTES = "notes.json"
FILES = 128
"""At most so many files make a table: all are open at a time."""

Notes = dict[str, Any]
Part = Generator[pa.RecordBatch, None, Notes]
"""The record batches of one part of a table and, returned behind them, what is to be known of it (plain JSON)."""


class Table:
    """Record batches of one schema; a row is found by its number without reading others.

    ``notes``: what the parts of the table returned, in their order.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], notes: Sequence[Notes] = (), key: str | None = None) -> None:
        self.batches = [batch for batch in batches if batch.num_rows]
        self.notes, self.key = list(notes), key
        self.starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])
        self._numbers: dict[str, np.ndarray] = {}
        self._flat: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, [len]; a copy, which is kept."""
        if name not in self._numbers:
            parts = [batch.column(name).to_numpy() for batch in self.batches]
            self._numbers[name] = np.concatenate(parts or [np.zeros(0, np.int64)])
        return self._numbers[name]

    def sizes(self, name: str) -> np.ndarray:
        """How many numbers each row of a column of lists has, [len]."""
        parts = [np.diff(self.flat(n, name)[0]) for n in range(len(self.batches))]
        return np.concatenate(parts or [np.zeros(0, np.int32)])

    def values(self, name: str) -> np.ndarray:
        """All numbers of a column of lists, one row's behind another's; a copy."""
        parts = [self.flat(n, name) for n in range(len(self.batches))]
        return np.concatenate([values[ends[0] : ends[-1]] for ends, values in parts] or [np.zeros(0, np.int64)])

    def list_at(self, row: int, name: str) -> np.ndarray:
        """The numbers of one row of a column of lists; not copied."""
        batch = int(np.searchsorted(self.starts, row, side="right")) - 1
        offsets, values = self.flat(batch, name)
        place = row - int(self.starts[batch])
        return values[offsets[place] : offsets[place + 1]]

    def flat(self, batch: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(offsets, values) of a column of lists of numbers in one batch; not copied."""
        if (batch, name) not in self._flat:
            column = self.batches[batch].column(name)
            self._flat[batch, name] = (column.offsets.to_numpy(), column.values.to_numpy())
        return self._flat[batch, name]

    def select(self, rows: np.ndarray) -> Iterator[pa.RecordBatch]:
        """The given rows, which ascend, as record batches."""
        if not len(rows):
            return
        owners = np.searchsorted(self.starts, rows, side="right") - 1
        found, edges = np.unique(owners, return_index=True)
        for n, part in zip(found.tolist(), np.split(rows, edges[1:]), strict=True):
            batch, chosen = self.batches[n], part - self.starts[n]
            if chosen[-1] - chosen[0] + 1 == len(chosen):
                yield batch.slice(int(chosen[0]), len(chosen))
            else:
                yield batch.take(pa.array(chosen))


class Stored(Sequence[T]):
    """A sequence whose items are made of stored ones whenever they are asked for; compares like a list."""

    BLOCK = 512

    @abstractmethod
    def many(self, indices: np.ndarray) -> list[T]:
        """The items of these numbers, which count from 0 and come in any order."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        found = range(len(self))[index]
        return (
            self.many(np.array(found, dtype=np.int64)) if isinstance(found, range) else self.many(np.array([found]))[0]
        )

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), self.BLOCK):
            yield from self.many(np.arange(start, min(start + self.BLOCK, len(self))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {len(self)}: {self[:3]}{'…' if len(self) > 3 else ''}"


@dataclass(frozen=True, slots=True)
class Store:
    """Where tables are kept, and how many processes build one.

    ``folder``: their cache; None keeps them in memory. ``workers``: None for one on each core that there is.
    """

    folder: Path | None = None
    workers: int | None = None

    def table(self, key: str | None, make: Callable[[T], Part], tasks: Sequence[T]) -> Table:
        """The table whose parts ``make`` gives, task by task: the one that is kept under ``key``, or built now.

        ``key`` has to change with all that the table depends on; None keeps it in memory. Processes that ask for the
        same one at the same time build it once.
        """
        if self.folder is None or key is None:
            return _in_memory(make, tasks)
        place = self.folder / "data" / f"{key}-{code()}"
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _locked(place.with_name(f"{place.name}.lock")):
                found = _open(place, key)
                return self._build(place, key, make, tasks) if found is None else found
        except OSError as error:
            log.warning("prepared data could not be kept in %s (cache_dir), memory takes it: %s", self.folder, error)
            return _in_memory(make, tasks)

    def _build(self, place: Path, key: str, make: Callable[[T], Part], tasks: Sequence[T]) -> Table:
        with atomic_folder(place) as part:
            together = max(1, -(-len(tasks) // FILES))
            shares = [tasks[start : start + together] for start in range(0, len(tasks), together)]
            kept = list(mapped(partial(_write, make, part), list(enumerate(shares)), self.workers))
            (part / NOTES).write_text(json.dumps(kept), encoding="utf-8")
        found = _open(place, key)
        if found is None:
            raise OSError(f"{place} is not what was written there")
        return found


MEMORY = Store()


@cache
def code() -> str:
    """A key of the code that reads and tokenises: what another version of it made is not used."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    found = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    found.update(f"{transformers.__version__} {tokenizers.__version__}".encode())
    return found.hexdigest()[:8]


def _in_memory(make: Callable[[T], Part], tasks: Sequence[T]) -> Table:
    batches: list[pa.RecordBatch] = []
    return Table(batches, [_drain(make(task), batches.append) for task in tasks])


def _drain(part: Part, take: Callable[[pa.RecordBatch], Any]) -> Notes:
    while True:
        try:
            take(next(part))
        except StopIteration as end:
            return end.value or {}


def _write(make: Callable[[T], Part], folder: Path, numbered: tuple[int, Sequence[T]]) -> dict[str, Any]:
    number, tasks = numbered
    file = folder / f"{number:05}.arrow"
    writer: Any = None

    def take(batch: pa.RecordBatch) -> None:
        nonlocal writer
        writer = writer or pa.ipc.new_file(str(file), batch.schema)
        writer.write_batch(batch)

    try:
        notes = [_drain(make(task), take) for task in tasks]
    finally:
        if writer is not None:
            writer.close()
    return {"bytes": file.stat().st_size if writer is not None else 0, "notes": notes}


def _open(place: Path, key: str) -> Table | None:
    """The table in a folder; None, with a message where there is one, if it cannot be what was written."""
    if not place.is_dir():
        return None
    try:
        kept = json.loads((place / NOTES).read_text(encoding="utf-8"))
        batches: list[pa.RecordBatch] = []
        for number, part in enumerate(kept):
            file = place / f"{number:05}.arrow"
            if part["bytes"] and file.stat().st_size != part["bytes"]:
                raise ValueError(f"{file.name} has {file.stat().st_size} bytes instead of {part['bytes']}")
            if part["bytes"]:
                reader = pa.ipc.open_file(pa.memory_map(str(file)))
                batches += [reader.get_batch(n) for n in range(reader.num_record_batches)]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        log.warning("prepared data in %s are refused and made anew: %s", place, error)
        return None
    return Table(batches, [notes for part in kept for notes in part["notes"]], key)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    # Processes that the holder starts hold it too: of a build that is killed, none writes once the next one begins.
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process prepares these data; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
