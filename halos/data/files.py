"""Rows of a data set with where each one stands: local files (.jsonl, .json, .parquet, .gz of these) and hub ids.

A location is ``train.jsonl:12`` (line 12) or ``train.json[3]`` (the third item), both counted from 1 and starting with
the path as it was given.
"""

from __future__ import annotations

import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

EXTENSIONS = (".jsonl", ".json", ".parquet")
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<split>\w[\w.-]*))?")

Located = tuple[str, dict[str, Any]]


def read_rows(path: str | Path) -> Iterator[Located]:
    """Yield (location, row) of a local file or of a hub data set, ``owner/name`` or ``owner/name:split``.

    Raises ``ValueError`` naming the file and the line or item for whatever cannot be read.
    """
    file = Path(path)
    rows = _read_hub(str(path)) if _is_hub_id(path) else _read_file(file)
    empty = True
    for located in rows:
        empty = False
        yield located
    if empty:
        raise ValueError(f"{path}: expected at least one row, found an empty file")


def _extension(file: Path) -> str:
    """The extension that says how to read ``file``, without ``.gz``."""
    return (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()


def _is_hub_id(path: str | Path) -> bool:
    # A mistyped data/train.jsonl looks like a hub id too; its extension or its folder says that a file was meant.
    if not isinstance(path, str) or Path(path).parent.is_dir() or _extension(Path(path)) in EXTENSIONS:
        return False
    return HUB_ID.fullmatch(path) is not None


def _read_file(file: Path) -> Iterator[Located]:
    if not file.exists():
        raise ValueError(f"{file}: no such file{_near_matches(file)}")
    if file.is_dir():
        raise ValueError(f"{file}: expected a file, found a folder; name the files in it")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    reader = readers.get(_extension(file))
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


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of ``file``, decompressed; what goes wrong while reading becomes a ``ValueError``."""
    opened: BinaryIO | gzip.GzipFile
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as opened:
            yield from opened
    except EOFError:
        raise ValueError(f"{file}: the gzip file ends too early, it is truncated; copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: expected a gzip file because of its name, found broken data ({error})") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror or error}") from None


def _decode(where: str, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: expected UTF-8 text, found byte 0x{line[error.start]:02x} at position {error.start + 1}; "
            "save the file as UTF-8"
        ) from None


def _parse(file: Path, line: int | None, text: str) -> Any:
    """``text`` as strict JSON; ``line`` is its line in ``file``, None when it is the whole file."""
    where = str(file) if line is None else f"{file}:{line}"
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        if line is None:
            where = f"{file}:{error.lineno}"
        hint = ""
        if line is None and error.msg == "Extra data":
            hint = "; one object a line is .jsonl, rename the file"
        elif line == 1 and text.lstrip().startswith("["):
            hint = "; one list of objects is .json, rename the file"
        raise ValueError(f"{where}: expected JSON, found an error at column {error.colno}: {error.msg}{hint}") from None
    except RecursionError:
        raise ValueError(f"{where}: expected rows of plain fields, found JSON that is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: expected JSON, found {error}") from None


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant}, which JSON does not have; use a number or null")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return row


def _as_row(where: str, value: Any) -> Located:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object {{...}}, found {_kind(value)}")
    return where, value


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _read_jsonl(file: Path) -> Iterator[Located]:
    for number, line in enumerate(_lines(file), start=1):
        where = f"{file}:{number}"
        text = _decode(where, line).removeprefix("\ufeff")
        if text.strip():
            yield _as_row(where, _parse(file, number, text))


def _read_json(file: Path) -> Iterator[Located]:
    lines = (_decode(f"{file}:{number}", line) for number, line in enumerate(_lines(file), start=1))
    text = "".join(lines).removeprefix("\ufeff")
    if not text.strip():
        return
    value = _parse(file, None, text)
    if isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()  # {"data": [...]}: the list is wrapped in an object that says nothing more
    if not isinstance(value, list):
        raise ValueError(f"{file}: expected a list of objects [{{...}}, ...], found {_kind(value)}")
    for number, item in enumerate(value, start=1):
        yield _as_row(f"{file}[{number}]", item)


def _read_parquet(file: Path) -> Iterator[Located]:
    # Imported here because most runs read JSON and pyarrow is slow to import.
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = io.BytesIO(b"".join(_lines(file))) if file.suffix == ".gz" else file
    number = 0
    try:
        for batch in pq.ParquetFile(source).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}[{number}]", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected a parquet file, found broken data ({_first_line(error)})") from None


def _read_hub(path: str) -> Iterator[Located]:
    # Imported here because it is slow and local files do not need it.
    from datasets import load_dataset

    match = HUB_ID.fullmatch(path)
    assert match is not None
    name, split = match["name"], match["split"] or "train"
    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # the hub client raises dozens of kinds, none of which a user can act on by type
        raise ValueError(
            f"{path}: expected a local file or a hub id that can be reached; there is no such file, and loading the "
            f"split {split!r} of the hub data set {name!r} failed: {_first_line(error)}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{split}[{number}]", dict(row)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
