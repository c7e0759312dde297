"""Rows of tables: CSV, Excel, Parquet, and data sets that ``datasets`` loads from a folder or from the hub."""

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from halos.data.reading.fields import NUMBER, RawRow, wrong
from halos.data.reading.json_files import Located, malformed, parse_json
from halos.data.reading.lines import OPENERS, USUAL, decode, first_line, lines

MAX_CELL_CHARACTERS = 1 << 22
"""Longest cell of a CSV file. Python's parser takes 8 bytes for each character of a cell: without a limit, a quote that
is never closed would take eight times the size of the file."""
MAX_ENTRIES = 100_000
"""Most files and folders below a folder of data files."""
NUMBERS = re.compile(
    r"desirable|rank|deleted|review_result|labels?|score(_chosen|_rejected|_A|_B|_ratio)?|reward(_A|_B)?"
    r"|(overall|fine-grained)_score"
)
COMPLETIONS = re.compile(r"chosen|rejected|completion|output(_A|_B)?|human_ref_[AB]|text")
"""Columns whose empty cells are empty texts, which adapters leave out and count; other empty cells have no value."""
NamedRows = tuple[str, Iterable[RawRow]]
"""A split that ``datasets`` has opened: the name that begins the locations of its rows, and the rows."""
MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")


def read_csv(file: Path, *, expansion: int = USUAL.max_expansion, keep_malformed: bool = False) -> Iterator[Located]:
    """Yield the rows below a header; the delimiter is the most frequent one in the header: comma, semicolon or tab.

    Cells are texts; :func:`typed` converts labels and scores to numbers.

    Args:
        file: the file.
        expansion: see :class:`halos.data.reading.lines.ReadingLimits`.
        keep_malformed: yield a :class:`.MalformedRow` for a row with more or fewer cells than the header, which is an
            error otherwise.
    """
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    text = _text(file, expansion)
    blank, first = next(((n, line) for n, line in enumerate(text) if line.strip()), (0, ""))
    if not first:
        return
    # Blank lines before the header are skipped here, as the parser would take one for a header without columns.
    # Strict: the parser would otherwise take text after a closing quote as part of the cell.
    reader = csv.reader(chain((first,), text), delimiter=max(",;\t", key=first.count), strict=True)
    number = blank + 1
    try:
        header = header_of(f"{file}:{number}", next(reader))
        number = blank + reader.line_num + 1
        for cells in reader:
            if cells:
                yield row_of(f"{file}:{number}", header, cells, keep_malformed)
            number = blank + reader.line_num + 1
    except csv.Error as error:
        if "field limit" not in str(error):
            raise ValueError(f"{file}:{number}: expected CSV, found a row that is not: {error}") from None
        raise ValueError(
            f"{file}:{number}: expected cells of up to {MAX_CELL_CHARACTERS:,} characters, found a longer one, or a "
            "quote that is never closed; longer texts can be read from .jsonl"
        ) from None


def _text(file: Path, expansion: int) -> Iterator[str]:
    for number, line in enumerate(lines(file, expansion=expansion), start=1):
        try:
            yield line.decode("utf-8") if number > 1 else decode(f"{file}:1", line)
        except UnicodeDecodeError:
            decode(f"{file}:{number}", line)  # raises, naming line and position


def header_of(where: str, names: list[str]) -> list[str]:
    """Return the names of the columns; raise ``ValueError`` if one is empty or occurs twice."""
    names = [name.strip() for name in names]
    if not all(names):
        raise ValueError(f"{where}: expected a name for every column, found none for column {names.index('') + 1}")
    if twice := [name for n, name in enumerate(names) if name in names[:n]]:
        raise ValueError(f"{where}: expected every column once, found {twice[0]!r} twice")
    return names


def row_of(where: str, header: list[str], cells: list[str], keep_malformed: bool) -> Located:
    """Return a row of cells, or a malformed one (else an error) where their number is not that of the header."""
    if len(cells) == len(header):
        return where, dict(zip(header, cells, strict=True))
    error = ValueError(f"{where}: expected {len(header)} cells as in the header, found {len(cells)}")
    return malformed(where, error, keep_malformed)


def typed(where: str, row: RawRow) -> dict[str, object]:
    """Convert the cells of a CSV row by the names of their columns.

    Labels and scores become numbers, and lists are parsed as JSON. An empty cell becomes None, except in a column of
    completions.

    Raises:
        ValueError: for a list of messages that is not JSON; as a text it would be trained on with its brackets.
    """
    return {name: _typed(where, name, cell) if isinstance(cell, str) else cell for name, cell in row.items()}


def _typed(where: str, name: str, cell: str) -> object:
    if NUMBERS.fullmatch(name):
        return _number(where, name, cell.strip())
    if not cell.strip():
        return cell if COMPLETIONS.fullmatch(name) else None
    # Whether a prompt is a text or a list of messages is decided by how it begins, also for lists in Python's spelling
    # (single quotes), which pandas writes and JSON refuses.
    if MESSAGES.match(cell) or name in ("completions", "preferences", "messages", "replies"):
        return parse_json(f"{where}: {name}", cell)
    return cell


def _number(where: str, name: str, cell: str) -> object:
    if not cell:
        return None
    if cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    if cell.lower() in ("desirable", "undesirable"):
        return cell
    # Nobody means a number of hundreds of digits, and one of thousands takes long to convert.
    if len(cell) > 400 or not NUMBER.fullmatch(cell):
        raise wrong(where, name, "a number or a label", cell)
    return int(cell) if cell.lstrip("+-").isdigit() else float(cell)


def read_parquet(file: Path, *, expansion: int = USUAL.max_expansion) -> Iterator[Located]:
    """Yield the rows of a Parquet file; its checksums are verified where it has them."""
    packed = file.suffix in OPENERS
    source = io.BytesIO(b"".join(lines(file, longest=None, expansion=expansion))) if packed else file
    number = 0
    try:
        table = pq.ParquetFile(source, page_checksum_verification=True)
        header_of(f"{file}:1", table.schema_arrow.names)
        # Few rows at a time: to_pylist makes Python objects of all rows in a batch, whose texts may be long.
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}[{number}]", row
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{file}: expected a parquet file, found broken data ({first_line(error)})") from None


def read_folder(folder: Path, split: str | None, *, streaming: bool = False) -> NamedRows:
    """Open a data set that ``datasets`` saved in a folder, or a folder of data files.

    Args:
        folder: the folder.
        split: the split; None: ``train``.
        streaming: do not convert data files first.
    """
    from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_from_disk

    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if not saved:
        _check_size(folder)
    try:
        data = load_from_disk(str(folder)) if saved else load_dataset(str(folder), streaming=streaming)
    except Exception as error:  # datasets raises dozens of types, none of which tells a user what to do
        raise ValueError(
            f"{folder}: expected a file, a data set saved by datasets or a folder of data files; "
            f"found a folder that datasets cannot load: {first_line(error)}"
        ) from None
    if isinstance(data, DatasetDict | IterableDatasetDict):
        name = split or "train"
        if name not in data:
            raise ValueError(f"{folder}: expected the split {name!r}, found {', '.join(data)}; write {folder}:SPLIT")
        data = data[name]
    return f"{folder}:{split}" if split else str(folder), data


def _check_size(folder: Path) -> None:
    # datasets walks through all folders below. A mistyped path may be a home folder or the root of the disk.
    entries = 0
    for _, folders, files in os.walk(folder):
        entries += len(folders) + len(files)
        if entries > MAX_ENTRIES:
            raise ValueError(
                f"{folder}: expected a folder of data files, found more than {MAX_ENTRIES:,} files and folders in and "
                f"below it; name the files, such as '{folder}/*.jsonl'"
            )


def read_hub(path: str, match: re.Match[str], *, streaming: bool = False) -> NamedRows:
    """Open a split of a hub data set, or of one of its folders.

    Args:
        path: the hub id as the user wrote it, for errors.
        match: its groups ``name``, ``folder`` and ``split``.
        streaming: do not download it first.
    """
    from datasets import load_dataset

    name, split = match["name"], match["split"] or "train"
    folder: Mapping[str, str] = {"data_dir": match["folder"]} if match["folder"] else {}
    try:
        rows = load_dataset(name, split=split, **folder, streaming=streaming)
    except Exception as error:  # the hub's client raises dozens of types, none of which tells a user what to do
        raise ValueError(
            f"{path}: expected a local file or a hub id that can be reached; there is no such file, and loading the "
            f"split {split!r} of the hub data set {name!r} failed: {first_line(error)}"
        ) from error
    return f"{'/'.join([name, *folder.values()])}:{split}", rows


def numbered(name: str, rows: Iterable[RawRow]) -> Iterator[Located]:
    """Yield the rows of a data set with their locations, counted from 1."""
    number = 1
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{name}[{number}]", dict(row)
            number += 1  # an error from here on is about the next row
    except Exception as error:  # of a streamed data set, whose files may be broken or out of reach by now
        raise ValueError(f"{name}[{number}]: expected a row, found {first_line(error)}") from error
