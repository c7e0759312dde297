"""Rows of a data set with where each one stands: local files, folders that ``datasets`` can load, and hub ids.

A location is ``train.jsonl:12`` (line 12) or ``train.json[3]`` (the third item), both counted from 1 and starting with
the path as it was given.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from halos.data.fields import keys_of
from halos.data.json_files import Located, read_json, read_jsonl
from halos.data.tables import read_csv, read_folder, read_hub, read_parquet, typed

READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}
EXTENSIONS = tuple(READERS)
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(/(?P<folder>\w[\w./-]*))?(:(?P<split>\w[\w.-]*))?")


def read_rows(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[Located]:
    """Yield (location, row) of a local file, of a folder (``folder`` or ``folder:split``) or of a hub data set
    (``owner/name``, ``owner/name:split``, ``owner/name/folder:split``).

    ``columns`` renames keys of the rows: from the name that a format expects to the one that the file has.
    Raises ``ValueError`` naming the file and the line or item for whatever cannot be read.
    """
    empty = True
    is_csv = _extension(Path(path)) in (".csv", ".tsv")
    for where, row in _open(path):
        empty = False
        renamed = _renamed(where, row, columns) if columns else row
        yield where, typed(where, renamed) if is_csv else renamed
    if empty:
        raise ValueError(f"{path}: expected at least one row, found an empty file")


def expand(path: str | Path) -> list[str | Path]:
    """The files that a pattern (``data/*.jsonl``) stands for, sorted; any other path stands for itself."""
    if not glob.has_magic(str(path)) or Path(path).exists():
        return [path]
    found: list[str | Path] = [*sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (keeps paths as given)
    if not found:
        raise ValueError(f"{path}: no file matches this pattern")
    return found


def _open(path: str | Path) -> Iterator[Located]:
    match = HUB_ID.fullmatch(path) if isinstance(path, str) and _may_be_hub_id(path) else None
    if match is not None:
        return read_hub(str(path), match)
    folder, _, split = str(path).rpartition(":")
    if Path(path).is_dir():
        return read_folder(Path(path), None)
    return read_folder(Path(folder), split) if Path(folder).is_dir() and split and folder else _read_file(Path(path))


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
    if not file.exists():
        raise ValueError(f"{file}: no such file{_near_matches(file)}")
    reader = READERS.get(_extension(file))
    if reader is None:
        raise ValueError(
            f"{file}: expected a name that ends in {', '.join(EXTENSIONS)} (or one of these and .gz); "
            f"found {''.join(file.suffixes) or 'no extension'}"
        )
    return reader(file)


def _near_matches(file: Path) -> str:
    if not file.parent.is_dir():
        return f"; there is no folder {file.parent} either"
    near = difflib.get_close_matches(file.name, sorted(entry.name for entry in file.parent.iterdir()))
    return f"; did you mean {' or '.join(near)}?" if near else f"; nothing in {file.parent} has a similar name"
