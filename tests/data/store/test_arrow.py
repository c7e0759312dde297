"""Tables: what is found in them, what is kept, and what an interrupted or concurrent build leaves."""

import contextlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from halos.caches import Seals
from halos.data.store import arrow
from halos.data.store.arrow import Part, Store
from halos.data.store.table import Stored, Table
from tests.owners import as_if_owned_by_another

SCHEMA = pa.schema({"n": pa.int64(), "many": pa.list_(pa.int64()), "text": pa.string()})
SIZES = (3, 0, 5, 1, 4)
"""Rows of the batches that one task gives."""


def part(task: int) -> Part:
    """Rows with a number, a list of as many numbers and a text."""
    row = 100 * task
    for size in SIZES:
        rows = range(row, row + size)
        columns = [list(rows), [[n] * (n % 4) for n in rows], [f"t{n}" for n in rows]]
        arrays = [pa.array(values, kind) for values, kind in zip(columns, SCHEMA.types, strict=True)]
        yield pa.record_batch(arrays, schema=SCHEMA)
        row += size
    return {"task": task}


EXPECTED = [100 * task + n for task in range(3) for n in range(sum(SIZES))]


def table(store: Store = arrow.MEMORY, key: str | None = "k", make: Callable[[int], Part] = part) -> Table:
    return store.table(key, make, [0, 1, 2])


def texts(found: Table, rows: list[int]) -> list[str]:
    return [text for batch in found.select(np.array(rows, dtype=int)) for text in batch.column("text").to_pylist()]


@pytest.fixture(params=["memory", "disk", "two processes"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    folder = None if request.param == "memory" else tmp_path
    return Store(folder, 2 if request.param == "two processes" else 1)


def test_a_table_holds_what_its_parts_gave_in_order(store: Store) -> None:
    found = table(store)
    assert len(found) == len(EXPECTED)
    assert found.numbers("n").tolist() == EXPECTED
    assert found.sizes("many").tolist() == [n % 4 for n in EXPECTED]
    assert [found.list_at(row, "many").tolist() for row in range(len(found))] == [[n] * (n % 4) for n in EXPECTED]
    assert found.notes == [{"task": task} for task in range(3)]
    for rows in ([], [0], [38], [2, 3], [0, 7, 8, 9, 20, 38], list(range(39))):
        assert texts(found, rows) == [f"t{EXPECTED[row]}" for row in rows]


def test_many_tasks_share_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow, "MAX_FILES", 2)
    for _ in range(2):  # built, then opened
        found = table(Store(tmp_path, 2))
        assert found.numbers("n").tolist() == EXPECTED
        assert found.notes == [{"task": task} for task in range(3)]
    assert len(list(tmp_path.glob("data/*/*.arrow"))) == 2


def test_an_empty_table_has_empty_columns(tmp_path: Path) -> None:
    def nothing(task: int) -> Part:
        yield from ()
        return {}

    found = table(Store(tmp_path, 1), make=nothing)
    assert len(found) == len(found.numbers("n")) == len(found.sizes("many")) == 0
    assert texts(found, []) == []


def test_a_table_is_built_once_for_its_key(tmp_path: Path) -> None:
    built: list[int] = []

    def counted(task: int) -> Part:
        built.append(task)
        return (yield from part(task))

    for _ in range(2):
        assert table(Store(tmp_path, 1), make=counted).numbers("n").tolist() == EXPECTED
    assert built == [0, 1, 2]
    table(Store(tmp_path, 1), key="another", make=counted)
    assert built == [0, 1, 2] * 2
    assert table(Store(tmp_path, 1), key=None, make=counted).key is None
    assert built == [0, 1, 2] * 3


@pytest.mark.parametrize("harm", ["cut", "missing", "notes", "no notes", "not arrow", "a file"])
def test_a_table_that_is_not_what_was_written_is_made_anew(
    harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table(Store(tmp_path, 1))
    (place,) = (tmp_path / "data").glob(f"k-{arrow.format_key()}")
    file = place / "00001.arrow"
    if harm == "cut":
        os.truncate(file, file.stat().st_size - 8)
    elif harm == "missing":
        file.unlink()
    elif harm == "notes":
        (place / arrow.NOTES).write_text('{"files": [{"sha256": "many"}], "seal": 3}', encoding="utf-8")
    elif harm == "no notes":
        (place / arrow.NOTES).unlink()
    elif harm == "not arrow":
        file.write_bytes(b"?" * file.stat().st_size)
    else:
        place.rename(tmp_path / "elsewhere")
        place.write_text("no folder", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert table(Store(tmp_path, 1)).numbers("n").tolist() == EXPECTED
    if harm != "a file":
        assert "cannot be used and is prepared again" in caplog.text
        assert len(json.loads((place / arrow.NOTES).read_text(encoding="utf-8"))["files"]) == 3


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, "notes"])
def test_a_flipped_bit_is_found(share: float | str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table(Store(tmp_path, 1))
    place = only_entry(tmp_path)
    file = place / arrow.NOTES if isinstance(share, str) else place / "00001.arrow"
    content = bytearray(file.read_bytes())
    # Of the notes, a bit in the number of a task: still JSON, of the same size.
    at = content.index(b'"task": 1') + 8 if isinstance(share, str) else int(share * len(content))
    content[at] ^= 1
    file.write_bytes(content)
    assert table(Store(tmp_path, 1)).numbers("n").tolist() == EXPECTED
    assert "checksum" in caplog.text
    assert "cannot be used and is prepared again" in caplog.text
    caplog.clear()
    assert table(Store(tmp_path, 1)).notes == [{"task": task} for task in range(3)]
    assert not caplog.text


def not_built(task: int) -> Part:
    raise AssertionError("it is there already")
    yield


def only_entry(folder: Path) -> Path:
    (place,) = (path for path in (folder / "data").iterdir() if path.is_dir())
    return place


@pytest.mark.parametrize("harm", ["owner", "owner of a file", "mode", "mode of a file", "mode of the cache"])
def test_what_another_user_could_have_written_is_not_used(
    harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(Store(tmp_path, 1))
    place = only_entry(tmp_path)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (place.parent, place)] == [0o700, 0o700]
    assert stat.S_IMODE((place / "00001.arrow").stat().st_mode) == 0o600
    path = {"a file": place / "00001.arrow", "the cache": place.parent}.get(harm.partition(" of ")[2], place)
    if harm.startswith("mode"):
        path.chmod(0o777)
    else:
        as_if_owned_by_another(path, monkeypatch)
    assert table(Store(tmp_path, 1)).numbers("n").tolist() == EXPECTED
    assert "could have been written by another user" in caplog.text


def test_a_cache_is_shared_by_those_who_have_its_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = Seals(b"k" * 32), Seals(b"x" * 32)
    earlier = os.umask(0o002)
    try:
        table(Store(tmp_path / "ours", 1, ours))
    finally:
        os.umask(earlier)
    place = only_entry(tmp_path / "ours")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (place.parent, place, place / "00001.arrow")]
    assert modes == [0o775, 0o775, 0o664], "modes follow the umask"
    as_if_owned_by_another(place, monkeypatch)
    assert table(Store(tmp_path / "ours", 1, ours), make=not_built).numbers("n").tolist() == EXPECTED
    # Somebody without the key writes other numbers, with the checksums that belong to them.
    table(Store(tmp_path / "forged", 1, theirs))
    shutil.copy(only_entry(tmp_path / "forged") / arrow.NOTES, place / arrow.NOTES)
    forged = (place / arrow.NOTES).read_bytes()
    built: list[int] = []

    def counted(task: int) -> Part:
        built.append(task)
        return (yield from part(task))

    assert table(Store(tmp_path / "ours", 1, ours), make=counted).numbers("n").tolist() == EXPECTED
    assert built == [0, 1, 2]
    assert "is not sealed with cache_key_file" in caplog.text
    assert (place / arrow.NOTES).read_bytes() == forged, "another user's entry is not deleted"


def test_prepared_data_that_can_be_read_but_not_locked_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(Store(tmp_path, 1))

    def refuse(file: Path) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(arrow, "_locked", refuse)
    assert table(Store(tmp_path, 1), make=not_built).numbers("n").tolist() == EXPECTED


@pytest.mark.parametrize("changed", ["format", "transformers", "tokenizers"])
def test_a_table_of_another_format_or_version_is_not_used(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(Store(tmp_path, 1))
    if changed == "format":
        monkeypatch.setattr(arrow, "PREPARED_FORMAT", arrow.PREPARED_FORMAT + 1)
    else:
        monkeypatch.setattr(
            arrow, "version", lambda name: "0.0.1" if name == changed else importlib.metadata.version(name)
        )
    built: list[int] = []

    def counted(task: int) -> Part:
        built.append(task)
        return (yield from part(task))

    table(Store(tmp_path, 1), make=counted)
    assert built == [0, 1, 2]


def test_an_error_in_a_part_leaves_nothing(tmp_path: Path) -> None:
    def failing(task: int) -> Part:
        yield from part(task)
        if task == 1:
            raise ValueError("file:7: no")
        return {}

    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"^file:7: no$"):
            table(Store(tmp_path, workers), make=failing)
        assert [entry.name for entry in (tmp_path / "data").iterdir() if entry.is_dir()] == []


def test_a_folder_that_cannot_be_written_costs_memory_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert table(Store(tmp_path / "file", 1)).numbers("n").tolist() == EXPECTED
    assert "could not be kept" in caplog.text


def forked(work: Callable[[], Any]) -> int:
    """The id of a process that does this and ends, with 0 unless it raised."""
    if child := os.fork():
        return child
    with contextlib.suppress(BaseException):
        work()
        os._exit(0)
    os._exit(1)


WHOLE = f"k-{arrow.format_key()}"
KILLED = ("first batch", "between batches", "second part", "before the notes", "before the move", "after the move")


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("point", KILLED)
def test_a_build_that_is_killed_leaves_nothing_that_is_used(
    point: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = forked(lambda: _build_and_die(Store(tmp_path, workers), point, os.getpid(), monkeypatch))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it was killed at this point"
    folders = [entry.name for entry in (tmp_path / "data").iterdir() if entry.is_dir()]
    left = [re.sub(r"\.[0-9a-f]{16}\.part$", ".part", name) for name in folders]
    assert left == ([WHOLE] if point == "after the move" else [f".{WHOLE}.part"]), "the name of a whole table"
    built: list[int] = []

    def counted(task: int) -> Part:
        built.append(task)
        return (yield from part(task))

    assert table(Store(tmp_path, 1), make=counted).numbers("n").tolist() == EXPECTED
    assert built == ([] if point == "after the move" else [0, 1, 2])
    assert [entry.name for entry in (tmp_path / "data").iterdir() if entry.is_dir()] == [WHOLE]


def _build_and_die(store: Store, point: str, process: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        os.kill(process, signal.SIGKILL)
        time.sleep(60)

    def dying(task: int) -> Part:
        for n, batch in enumerate(part(task)):
            if (point, task, n) in (("first batch", 0, 0), ("between batches", 0, 2), ("second part", 1, 1)):
                die()
            yield batch
        return {"task": task}

    replace = Path.replace
    if point == "before the notes":
        monkeypatch.setattr(Path, "write_text", lambda *_, **__: die())
    if point.endswith("the move"):

        def moved(self: Path, target: Any) -> None:
            if point == "after the move":
                replace(self, target)
            die()

        monkeypatch.setattr(Path, "replace", moved)
    table(store, make=dying)


def test_two_processes_that_ask_at_the_same_time_build_once(tmp_path: Path) -> None:
    log = tmp_path / "built"

    def slow(task: int) -> Part:
        with log.open("a", encoding="utf-8") as out:
            out.write(f"{task}\n")
        time.sleep(0.2)
        return (yield from part(task))

    def ask() -> None:
        assert table(Store(tmp_path, 1), make=slow).numbers("n").tolist() == EXPECTED

    children = [forked(ask) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert log.read_text(encoding="utf-8").split() == ["0", "1", "2"]


class Squares(Stored[int]):
    BLOCK = 4

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def many(self, indices: np.ndarray) -> list[int]:
        assert len(indices) <= self.BLOCK
        assert ((indices >= 0) & (indices < self.size)).all()
        return [int(n) ** 2 for n in indices]


def test_stored_items_are_read_like_a_list() -> None:
    found, expected = Squares(10), [n * n for n in range(10)]
    assert found == expected == list(found)
    assert found != expected[:-1]
    assert found != [*expected[:-1], 0]
    assert [found[3], found[-1], found[2:5], found[::-4]] == [9, 81, [4, 9, 16], [81, 25, 1]]
    assert list(Squares(0)) == Squares(0)[:] == []
    with pytest.raises(IndexError):
        found[10]
    assert repr(found) == "Squares of 10: [0, 1, 4]…"
