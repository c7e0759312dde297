"""Rows of Excel files (.xlsx), with cells as texts, as a CSV file has them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import closing
from datetime import date, time
from pathlib import Path
from typing import TYPE_CHECKING

from halos.data.reading.json_files import Located, malformed
from halos.data.reading.lines import USUAL, first_line, most_bytes, too_large
from halos.data.reading.tables import header_of, row_of

if TYPE_CHECKING:
    from openpyxl.worksheet._read_only import ReadOnlyWorksheet

LONGEST_CELL = 32_767
"""Characters of a cell at which Excel cuts texts off."""


def read_xlsx(file: Path, *, expansion: int = USUAL.max_expansion, keep_malformed: bool = False) -> Iterator[Located]:
    """Yield the rows below the header of the one sheet that has cells, located by the numbers that Excel shows.

    Args:
        file: the file.
        expansion: see :class:`halos.data.reading.lines.ReadingLimits`.
        keep_malformed: yield a :class:`.MalformedRow` for a malformed row, which is an error otherwise.

    Raises:
        ValueError: openpyxl is missing, the file is broken, several sheets have cells, or a text may be cut off.
    """
    rows = _rows(file, expansion)
    number, names = next(rows, (1, []))
    header = header_of(f"{file}:{number}", names) if names else []
    for number, cells in rows:
        where = f"{file}:{number}"
        # A row ends with its last cell that is not empty.
        located = row_of(where, header, cells + [""] * (len(header) - len(cells)), keep_malformed)
        if cut := next((name for name, cell in zip(header, cells, strict=False) if len(cell) >= LONGEST_CELL), None):
            expected = f"{where}: expected {cut!r} to be shorter than {LONGEST_CELL:,} characters"
            error = ValueError(f"{expected}, at which Excel cuts texts off; longer texts can be read from .jsonl")
            located = malformed(where, error, keep_malformed)
        yield located


def _rows(file: Path, expansion: int) -> Iterator[tuple[int, list[str]]]:
    """Yield (number, cells) of the rows that are not empty."""
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise ValueError(
            f"{file}: reading .xlsx needs openpyxl; pip install 'halos[excel]', or save the sheet as .csv"
        ) from None
    _check_size(file, expansion)
    try:
        # Only the values of formulas; one row in memory at a time.
        with closing(load_workbook(file, read_only=True, data_only=True, keep_links=False)) as book:
            filled = [sheet for sheet in book.worksheets if next(_filled(sheet), None)]
            if len(filled) == 1:
                yield from _filled(filled[0])
    except Exception as error:  # openpyxl raises dozens of types, none of which tells a user what to do
        raise ValueError(f"{file}: expected an Excel file, found broken data ({first_line(error)})") from None
    if len(filled) > 1:
        names = ", ".join(repr(sheet.title) for sheet in filled)
        raise ValueError(f"{file}: expected one sheet with cells, found {names}; save one as a file of its own")


def _filled(sheet: ReadOnlyWorksheet) -> Iterator[tuple[int, list[str]]]:
    """Yield (number, cells) of the rows of a sheet that are not empty, without the empty cells at their ends."""
    # Some programs write wrong dimensions, and rows beyond them would be lost.
    sheet.reset_dimensions()
    for number, values in enumerate(sheet.iter_rows(values_only=True), start=1):
        cells = [_text(value) for value in values]
        while cells and not cells[-1].strip():
            cells.pop()
        if cells:
            yield number, cells


def _text(value: object) -> str:
    """Return a cell as a CSV file would have it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.15g}"  # the digits that Excel has
    return value.isoformat() if isinstance(value, date | time) else str(value)


def _check_size(file: Path, expansion: int) -> None:
    """Raise ``ValueError`` for a file that is not an archive, or that decompresses to suspiciously much."""
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        most = most_bytes(file, expansion)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{file}: expected an Excel file, found broken data ({first_line(error)})") from None
    if size > most:
        raise too_large(file, expansion)
