"""Where tables are kept: in memory, or on disk, from where they are memory-mapped.

    FOLDER/data/<key>-<format key>/00000.arrow, 00001.arrow, …, notes.json

A table is built in a folder next to its final place, under a lock, and renamed when it is complete. So a folder with
the final name is complete, and the next build replaces what an interrupted one has left. ``notes.json`` has the
checksum of every file and is sealed itself (:class:`halos.caches.Seals`); all are verified whenever a table is opened.
"""

import fcntl
import gc
import hashlib
import json
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from halos.caches import PRIVATE, Refused, Seals
from halos.data.store.parallel import mapped
from halos.data.store.table import Notes, Table
from halos.files import atomic_folder, in_home, sha256_of

log = logging.getLogger(__name__)

T = TypeVar("T")

PREPARED_FORMAT = 7
"""Number of the format of prepared tables (records, turns and token rows).

Raise it by one whenever the same files or examples give other tables: another column, id, digest or adapter rule.
Prepared data with another number is not used. ``tests/data/test_prepared_format.py`` fails if golden tables change
and the number does not.
"""
NOTES = "notes.json"
DAMAGE = (OSError, ValueError, LookupError, TypeError, pa.ArrowException)
"""Errors of reading a folder that is not what was written."""
MAX_FILES = 128
"""Files of one table; all of them are open at a time."""

Part = Generator[pa.RecordBatch, None, Notes]
"""Yields the record batches of one part of a table, then returns its notes."""


@dataclass(frozen=True, slots=True)
class Store:
    """Where tables are kept, and how many processes build one.

    Attributes:
        folder: the cache folder; None keeps tables in memory.
        workers: processes that build a table on disk; None for one on each core.
        seals: which stored tables may be used.
    """

    folder: Path | None = None
    workers: int | None = None
    seals: Seals = PRIVATE

    def table(self, key: str | None, make: Callable[[T], Part], tasks: Sequence[T]) -> Table:
        """Return the table that is stored under ``key``, or build it.

        Processes that request the same table at the same time build it once.

        Args:
            key: changes with everything that the table depends on, except the format (:func:`format_key`); None keeps
                the table in memory.
            make: makes the part of one task.
            tasks: the tasks, in the order of the table.
        """
        if self.folder is None or key is None:
            return _in_memory(make, tasks)
        place = self.folder / "data" / f"{key}-{format_key()}{self.seals.suffix}"
        with suppress(*DAMAGE):  # without the lock, which may be another user's: a folder with this name is complete
            return self._read(place, key)
        # A cache that cannot be written (full disk, read-only folder) must not stop a run that fits into memory.
        try:
            self.seals.check_owner(self.seals.make_folder(self.folder, "data"))
            with _locked(place.with_name(f"{place.name}.lock")):
                table = self._open(place, key)
                if table is None:
                    self._build(place, make, tasks)
                    # Read back from disk, also by the process that wrote it: the batches are then mapped, not in its
                    # memory.
                    table = self._open(place, key)
                if table is None:
                    raise OSError(f"{place} cannot be read back as it was written")
                return table
        except (OSError, Refused) as error:
            log.warning("prepared data could not be kept in %s (cache_dir), memory takes it: %s", self.folder, error)
            return _in_memory(make, tasks)

    def _build(self, place: Path, make: Callable[[T], Part], tasks: Sequence[T]) -> None:
        # One file for several tasks: every file stays memory-mapped, and processes may have few open files.
        tasks_per_file = max(1, -(-len(tasks) // MAX_FILES))
        shares = [tasks[start : start + tasks_per_file] for start in range(0, len(tasks), tasks_per_file)]
        if place.exists() and place.stat().st_uid != os.geteuid():
            raise PermissionError(f"{place} cannot be used and is another user's")
        with atomic_folder(place, private=self.seals.private) as folder:
            files = list(mapped(partial(_write, make, folder), list(enumerate(shares)), self.workers))
            notes = {"files": files, "seal": self.seals.seal(_sealed_text(place, files))}
            (folder / NOTES).write_text(json.dumps(notes), encoding="utf-8")

    def _open(self, place: Path, key: str) -> Table | None:
        """Open the table in a folder; return None, with a warning where a folder is, if it is not what was written."""
        if not place.is_dir():
            return None
        try:
            return self._read(place, key)
        except DAMAGE as error:
            log.warning("prepared data in %s cannot be used and is prepared again: %s", place, error)
            return None

    def _read(self, place: Path, key: str) -> Table:
        self.seals.check_owner(place.parent, place, place / NOTES)
        notes = json.loads((place / NOTES).read_text(encoding="utf-8"))
        shares = notes["files"]
        self.seals.check(notes["seal"], _sealed_text(place, shares))
        # Tasks without a batch have no file.
        digests = {place / f"{n:05}.arrow": share["sha256"] for n, share in enumerate(shares) if share["sha256"]}
        self.seals.check_owner(*digests)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # hashing releases the interpreter's lock
            for (file, expected), digest in zip(digests.items(), pool.map(sha256_of, digests), strict=True):
                if digest != expected:
                    raise ValueError(f"the checksum of {file.name} does not fit")
        readers = [pa.ipc.open_file(pa.memory_map(str(file))) for file in digests]
        batches = [reader.get_batch(n) for reader in readers for n in range(reader.num_record_batches)]
        return Table(batches, [note for share in shares for note in share["notes"]], key)


MEMORY = Store()


def format_key() -> str:
    """Return the part of the key that all tables share: the format number and the tokenizer libraries' versions."""
    # Asked of the installed packages: importing transformers takes seconds.
    versions = [version(library) for library in ("transformers", "tokenizers")]
    return f"{PREPARED_FORMAT}-{hashlib.sha256(repr(versions).encode()).hexdigest()[:8]}"


def _in_memory(make: Callable[[T], Part], tasks: Sequence[T]) -> Table:
    notes: list[Notes] = []
    with _rare_collections():
        batches = list(_made(make, tasks, notes))
    return Table(batches, notes)


def _made(make: Callable[[T], Part], tasks: Sequence[T], notes: list[Notes]) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of tasks, and add the notes of each part to ``notes``."""
    for task in tasks:
        notes.append((yield from make(task)))


def _write(make: Callable[[T], Part], folder: Path, numbered: tuple[int, Sequence[T]]) -> Notes:
    """Write the parts of some tasks to one file; return its checksum and their notes."""
    number, tasks = numbered
    file = folder / f"{number:05}.arrow"
    notes: list[Notes] = []
    with _rare_collections():
        batches = _made(make, tasks, notes)
        # The file is opened with the first batch, as only that tells the schema.
        first = next(batches, None)
        if first is None:
            return {"sha256": None, "notes": notes}
        with pa.ipc.new_file(str(file), first.schema) as writer:
            for batch in chain((first,), batches):
                writer.write_batch(batch)
    return {"sha256": sha256_of(file), "notes": notes}


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python's collector of reference cycles run seldom."""
    # Preparing makes millions of short-lived objects without cycles. By default the collector would search them, and
    # everything that transformers has imported, again and again: a quarter of the time.
    before = gc.get_threshold()
    gc.set_threshold(50_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _sealed_text(place: Path, shares: object) -> str:
    return json.dumps([place.name, shares])


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock file; wait for the process that holds it."""
    # Worker processes inherit the lock. So when a build is killed, none of its workers writes after the next build
    # has begun.
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process prepares this data; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cache_folder(cache_dir: str | Path | None) -> Path | None:
    """The folder that ``cache_dir`` names; ``auto`` is ``$HALOS_CACHE`` or ``~/.cache/halos``. None: no folder."""
    if cache_dir == "auto":
        cache_dir = os.environ.get("HALOS_CACHE") or "~/.cache/halos"
    return None if cache_dir is None else in_home(cache_dir)
