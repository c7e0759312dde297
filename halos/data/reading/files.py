"""Rows of a data set with where each one stands: local files, folders that ``datasets`` can load, and hub ids.

A location is ``train.jsonl:12`` (line 12) or ``train.json[3]`` (the third item), both counted from 1 and starting with
the path as it was given.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from halos.data.reading.fields import keys_of
from halos.data.reading.json_files import Located, read_json, read_jsonl
from halos.data.reading.tables import fingerprint, numbered, read_csv, read_folder, read_hub, read_parquet, typed

READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}
EXTENSIONS = tuple(READERS)
PIECE = 1 << 23
"""Bytes."""
EDGE = 1 << 16
"""Bytes at both ends of a file that its quick key covers."""
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(/(?P<folder>\w[\w./-]*))?(:(?P<split>\w[\w.-]*))?")


def read_rows(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[Located]:
    """Yield (location, row) of a local file, of a folder (``folder`` or ``folder:split``) or of a hub data set
    (``owner/name``, ``owner/name:split``, ``owner/name/folder:split``).

    ``columns`` renames keys of the rows: from the name that a format expects to the one that the file has.
    Raises ``ValueError`` naming the file and the line or item for whatever cannot be read.
    """
    empty = True
    for located in read_piece(Piece(path), columns):
        empty = False
        yield located
    if empty:
        raise ValueError(f"{path}: expected at least one row, found an empty file")


@dataclass(frozen=True, slots=True)
class Piece:
    """A file, folder or hub data set; of plain JSON lines perhaps the lines between two bytes, from line ``number``."""

    file: str | Path
    start: int = 0
    stop: int | None = None
    number: int = 1


def pieces(path: str | Path) -> Iterator[Piece]:
    """What can be read apart: JSON lines by stretches of some megabytes, everything else whole."""
    file = Path(path)
    if file.suffix.lower() != ".jsonl" or not file.is_file() or file.stat().st_size <= PIECE:
        yield Piece(path)
        return
    position, number = 0, 1
    with file.open("rb") as stream:
        while block := stream.read(PIECE):
            count = block.count(b"\n")
            size = len(block)
            del block
            rest = stream.readline()
            size, count = size + len(rest), count + rest.count(b"\n")
            yield Piece(path, position, position + size, number)
            position, number = position + size, number + count


def content_key(path: str | Path) -> str | None:
    """A key that changes with the content; None where it cannot be known."""
    file = Path(path)
    if file.is_file():
        try:
            with file.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            return None  # whoever reads it says so
    found = _data_set(path)
    return None if found is None else fingerprint(*found)


def read_piece(piece: Piece, columns: Mapping[str, str] | None = None, *, streaming: bool = False) -> Iterator[Located]:
    """The rows of a piece, none where it has none; see :func:`read_rows`. ``streaming`` begins at once with data sets
    that would otherwise be downloaded or converted first."""
    is_csv = _extension(Path(piece.file)) in (".csv", ".tsv")
    for where, row in _open(piece, streaming):
        renamed = _renamed(where, row, columns) if columns else row
        yield where, typed(where, renamed) if is_csv else renamed


def expand(path: str | Path) -> list[str | Path]:
    """The files that a pattern (``data/*.jsonl``) stands for, sorted; any other path stands for itself."""
    if not glob.has_magic(str(path)) or Path(path).exists():
        return [path]
    found: list[str | Path] = [*sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (keeps paths as given)
    if not found:
        raise ValueError(f"{path}: no file matches this pattern")
    return found


def check_streamable(path: str | Path) -> None:
    """Raises ``ValueError`` for a file that is not there, or whose kind can only be read whole."""
    file = Path(path)
    if _data_set_of(path) is not None:
        return
    _reader(file)
    if _extension(file) == ".json" or file.name.endswith(".parquet.gz"):
        raise ValueError(
            f"{file}: expected a file that can be read row by row with data.streaming=true (.jsonl, .csv, .tsv, each "
            "also gzipped, or .parquet); this kind is read whole"
        )


def edges_key(path: str | Path) -> str:
    """A key of a file's name, size, beginning and end: quick for a file of any size; of other data the name alone."""
    file = Path(path)
    found = hashlib.sha256(file.name.encode() if file.is_file() else str(path).encode())
    if file.is_file():
        size = file.stat().st_size
        found.update(str(size).encode())
        with file.open("rb") as stream:
            found.update(stream.read(EDGE))
            stream.seek(max(0, size - EDGE))
            found.update(stream.read())
    return found.hexdigest()


def _open(piece: Piece, streaming: bool) -> Iterator[Located]:
    if piece.stop is not None:
        return read_jsonl(Path(piece.file), piece.start, piece.stop, piece.number)
    found = _data_set(piece.file, streaming=streaming)
    return _read_file(Path(piece.file)) if found is None else numbered(*found)


def _data_set(path: str | Path, *, streaming: bool = False) -> tuple[str, Any] | None:
    """(its name, its rows) of a folder or a hub data set; None for a file."""
    read = _data_set_of(path)
    return None if read is None else read(streaming=streaming)


def _data_set_of(path: str | Path) -> Callable[..., tuple[str, Any]] | None:
    match = HUB_ID.fullmatch(path) if isinstance(path, str) and _may_be_hub_id(path) else None
    if match is not None:
        return partial(read_hub, str(path), match)
    folder, _, split = str(path).rpartition(":")
    if Path(path).is_dir():
        return partial(read_folder, Path(path), None)
    return partial(read_folder, Path(folder), split) if Path(folder).is_dir() and split and folder else None


def _extension(file: Path) -> str:
    """The extension that says how to read ``file``, without ``.gz``."""
    return (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()


def _may_be_hub_id(path: str) -> bool:
    # A mistyped data/train.jsonl looks like a hub id too; its extension or its folder says that a file was meant.
    return not any(parent.is_dir() for parent in Path(path).parents[:-1]) and _extension(Path(path)) not in EXTENSIONS


def _renamed(where: str, row: dict[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise ValueError(f"{where}: expected the key {theirs!r} (data.columns.{ours}); found {keys_of(row)}")
    given = set(columns.values())
    return {key: value for key, value in row.items() if key not in given and key not in columns} | {
        ours: row[theirs] for ours, theirs in columns.items()
    }


def _read_file(file: Path) -> Iterator[Located]:
    return _reader(file)(file)


def _reader(file: Path) -> Callable[[Path], Iterator[Located]]:
    if not file.exists():
        raise ValueError(f"{file}: no such file{_near_matches(file)}")
    reader = READERS.get(_extension(file))
    if reader is None:
        raise ValueError(
            f"{file}: expected a name that ends in {', '.join(EXTENSIONS)} (or one of these and .gz); "
            f"found {''.join(file.suffixes) or 'no extension'}"
        )
    return reader


def _near_matches(file: Path) -> str:
    if not file.parent.is_dir():
        return f"; there is no folder {file.parent} either"
    near = difflib.get_close_matches(file.name, sorted(entry.name for entry in file.parent.iterdir()))
    return f"; did you mean {' or '.join(near)}?" if near else f"; nothing in {file.parent} has a similar name"
