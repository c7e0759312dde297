"""Rows of tables: CSV, Parquet, and data sets that ``datasets`` loads from a folder or the hub."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halos.data.reading.fields import LABELS, RawRow, wrong
from halos.data.reading.json_files import Located, parse_json
from halos.data.reading.lines import decode, first_line, lines

LONGEST_CELL = 1 << 22
"""Characters. The module that parses CSV needs 8 bytes for each character of a cell: without a limit, a quote that is
never closed would take eight times the file."""
DELIMITERS = ",;\t"
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
NUMBERS = re.compile(
    r"desirable|rank|deleted|review_result|labels?|score(_chosen|_rejected|_A|_B|_ratio)?|reward(_A|_B)?"
    r"|(overall|fine-grained)_score"
)
COMPLETIONS = re.compile(r"chosen|rejected|completion|output(_A|_B)?|human_ref_[AB]|text")
"""Texts that are left out and counted where they are empty."""
STRUCTURES = ("completions", "preferences", "messages", "replies")
MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:")


def read_csv(file: Path) -> Iterator[Located]:
    """Rows under a header; the delimiter is a comma, a semicolon or a tab, whichever the header has most of.

    Cells are text; :func:`typed` makes numbers of labels and scores.
    """
    csv.field_size_limit(LONGEST_CELL)
    text = _text(file)
    blank, first = next(((n, line) for n, line in enumerate(text) if line.strip()), (0, ""))
    if not first:
        return
    reader = csv.reader(_chained(first, text), delimiter=max(DELIMITERS, key=first.count), strict=True)
    number = blank + 1
    try:
        header = _header(f"{file}:{number}", next(reader))
        number = blank + reader.line_num + 1
        for cells in reader:
            if cells:
                yield _row(f"{file}:{number}", header, cells)
            number = blank + reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}:{number}: {_fault(error)}") from None


def _fault(error: csv.Error) -> str:
    if "field limit" in str(error):
        return (
            f"expected cells of at most {LONGEST_CELL:,} characters, found a longer one, or a quote that is never "
            "closed; longer texts can be read from .jsonl"
        )
    return f"expected CSV, found a row that is not: {error}"


def _text(file: Path) -> Iterator[str]:
    for number, line in enumerate(lines(file), start=1):
        try:
            yield line.decode("utf-8") if number > 1 else decode(f"{file}:1", line)
        except UnicodeDecodeError:
            decode(f"{file}:{number}", line)  # raises, naming line and position


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _header(where: str, names: list[str]) -> list[str]:
    names = [name.strip() for name in names]
    if not all(names):
        raise ValueError(f"{where}: expected a name for every column, found none for column {names.index('') + 1}")
    if twice := [name for n, name in enumerate(names) if name in names[:n]]:
        raise ValueError(f"{where}: expected every column once, found {twice[0]!r} twice")
    return names


def _row(where: str, header: list[str], cells: list[str]) -> Located:
    if len(cells) != len(header):
        raise ValueError(f"{where}: expected {len(header)} cells as in the header, found {len(cells)}")
    return where, dict(zip(header, cells, strict=True))


def typed(where: str, row: RawRow) -> dict[str, Any]:
    """A row of CSV cells with what its columns' names say: labels and scores become numbers, lists are read as JSON,
    and an empty cell says nothing, but that a completion is empty.

    Raises ``ValueError`` for a list of messages that is not JSON: as a text it would be trained on with its brackets.
    """
    return {name: _typed(where, name, cell) if isinstance(cell, str) else cell for name, cell in row.items()}


def _typed(where: str, name: str, cell: str) -> Any:
    if NUMBERS.fullmatch(name):
        return _number(where, name, cell.strip())
    if not cell.strip():
        return cell if COMPLETIONS.fullmatch(name) else None
    if MESSAGES.match(cell) or name in STRUCTURES:
        return parse_json(f"{where}: {name}", cell)
    return cell


def _number(where: str, name: str, cell: str) -> Any:
    if not cell:
        return None
    if cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    if cell.lower() in LABELS:
        return cell
    if len(cell) > 400 or not NUMBER.fullmatch(cell):
        raise wrong(where, name, "a number or a label", cell)
    return int(cell) if cell.lstrip("+-").isdigit() else float(cell)


def read_parquet(file: Path) -> Iterator[Located]:
    """Rows of a Parquet file, with its checksums verified where it has them."""
    # Imported here because most runs read JSON and pyarrow is slow to import.
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = io.BytesIO(b"".join(lines(file))) if file.suffix == ".gz" else file
    number = 0
    try:
        table = pq.ParquetFile(source, page_checksum_verification=True)
        _header(f"{file}:1", table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}[{number}]", row
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{file}: expected a parquet file, found broken data ({first_line(error)})") from None


def read_folder(folder: Path, split: str | None, *, streaming: bool = False) -> tuple[str, Any]:
    """(name, rows) of a split of a data set that ``datasets`` saved there, or of a folder of data files, which
    ``streaming`` does not convert first."""
    from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_from_disk

    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        found = load_from_disk(str(folder)) if saved else load_dataset(str(folder), **_streaming(streaming))
    except Exception as error:  # of dozens of kinds, none of which a user can act on by type
        raise ValueError(
            f"{folder}: expected a file, a data set saved by datasets or a folder of data files; "
            f"found a folder that datasets cannot load: {first_line(error)}"
        ) from None
    if isinstance(found, DatasetDict | IterableDatasetDict):
        name = split or "train"
        if name not in found:
            raise ValueError(f"{folder}: expected the split {name!r}, found {', '.join(found)}; write {folder}:SPLIT")
        found = found[name]
    return f"{folder}:{split}" if split else str(folder), found


def read_hub(path: str, match: re.Match[str], *, streaming: bool = False) -> tuple[str, Any]:
    """(name, rows) of a split of a hub data set, or of one of its folders; ``streaming`` does not download it first."""
    from datasets import load_dataset

    name, split = match["name"], match["split"] or "train"
    folder: Mapping[str, str] = {"data_dir": match["folder"]} if match["folder"] else {}
    try:
        rows = load_dataset(name, split=split, **folder, **_streaming(streaming))
    except Exception as error:  # the hub client raises dozens of kinds, none of which a user can act on by type
        raise ValueError(
            f"{path}: expected a local file or a hub id that can be reached; there is no such file, and loading the "
            f"split {split!r} of the hub data set {name!r} failed: {first_line(error)}"
        ) from error
    return f"{'/'.join([name, *folder.values()])}:{split}", rows


def _streaming(asked: bool) -> dict[str, Any]:
    return {"streaming": True} if asked else {}


def fingerprint(where: str, rows: Any) -> str | None:
    """The key that ``datasets`` has for the content of a data set."""
    return getattr(rows, "_fingerprint", None)


def numbered(where: str, rows: Any) -> Iterator[Located]:
    """The rows of a data set with their places, counted from 1."""
    number, found = 0, iter(rows)
    while True:
        number += 1
        try:
            row = dict(next(found))
        except StopIteration:
            return
        except Exception as error:  # of a streamed data set: files that are broken or cannot be reached any more
            raise ValueError(f"{where}[{number}]: expected a row, found {first_line(error)}") from error
        yield f"{where}[{number}]", row
