"""Excel files: cells as a CSV file would have them, and what would be lost is refused."""

import os
import zipfile
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from halos.data.reading.files import Piece, read_piece
from halos.data.records.record import Message
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.sources.shp import SHPSource

has_openpyxl = pytest.mark.skipif(find_spec("openpyxl") is None and not os.environ.get("CI"), reason="needs openpyxl")


def write(file: Path, *rows: list[Any], **sheets: list[list[Any]]) -> Path:
    from openpyxl import Workbook

    book = Workbook()
    for row in rows:
        book.active.append(row)
    for title, of_sheet in sheets.items():
        sheet = book.create_sheet(title)
        for row in of_sheet:
            sheet.append(row)
    book.save(file)
    return file


@has_openpyxl
def test_cells_are_texts_located_by_the_number_of_the_row(tmp_path: Path) -> None:
    file = write(
        tmp_path / "f.xlsx",
        ["a", "b ", None],
        [1, 0.1 + 0.2],
        [],
        [None, True],
        [date(2026, 1, 2), "é"],
        Empty=[[None]],
    )
    assert list(read_piece(Piece(file))) == [
        (f"{file}:2", {"a": "1", "b": "0.3"}),
        (f"{file}:4", {"a": None, "b": "True"}),
        (f"{file}:5", {"a": "2026-01-02T00:00:00", "b": "é"}),
    ]


@has_openpyxl
def test_a_sheet_of_thumbs(tmp_path: Path) -> None:
    chat = '[{"role": "user", "content": "Hello"}]'
    file = write(tmp_path / "f.xlsx", ["question", "answer", "thumb"], ["2+2?", 4, "👍"], [chat, "Hi", False])
    first, second = FeedbackFiles(file).train().records
    assert (first.prompt, first.completions[0].text, first.completions[0].desirable) == ("2+2?", "4", True)
    assert (second.prompt, second.completions[0].desirable) == ((Message("user", "Hello"),), False)


@has_openpyxl
def test_other_formats_read_it_too(tmp_path: Path) -> None:
    names = ["history", "human_ref_A", "human_ref_B", "labels", "score_ratio"]
    (record,) = SHPSource(write(tmp_path / "f.xlsx", names, ["q", "a", "b", 0, 2.5])).train().records
    assert record.preferences == ((1, 0),)


@has_openpyxl
@pytest.mark.parametrize(
    ("rows", "sheets", "words"),
    [
        ([["a"], [1, 2]], {}, r"f\.xlsx:2: expected 1 cells as in the header, found 2"),
        ([["a", None, "b"], [1, 2, 3]], {}, r"f\.xlsx:1: expected a name for every column, found none for column 2"),
        ([["a"], ["x" * 32767]], {}, r"f\.xlsx:2: expected 'a' to be shorter than 32,767 characters, at which"),
        ([["a"], [1]], {"More": [["a"], [2]]}, r"f\.xlsx: expected one sheet with cells, found 'Sheet', 'More'; save"),
    ],
)  # fmt: skip
def test_what_would_be_lost(rows: list[Any], sheets: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = write(tmp_path / "f.xlsx", *rows, **sheets)
    with pytest.raises(ValueError, match=words):
        list(read_piece(Piece(file)))


@has_openpyxl
def test_bad_rows_are_skipped(tmp_path: Path) -> None:
    file = write(tmp_path / "f.xlsx", ["prompt", "completion"], ["q", "a"], ["q", "a", "b"], ["q", "x" * 32767])
    records = FeedbackFiles(file, bad_rows="skip").train()
    assert len(records.records) == 1
    assert records.dropped == {"filtered: malformed rows": 2}


@has_openpyxl
def test_rows_beyond_the_dimensions_that_the_file_states_are_read(tmp_path: Path) -> None:
    whole = write(tmp_path / "g.xlsx", ["a"], [1], [2])
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "f.xlsx", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b'ref="A1:A3"', b'ref="A1"'))
    assert len(list(read_piece(Piece(tmp_path / "f.xlsx")))) == 2


@has_openpyxl
@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 broken"])
def test_broken_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "f.xlsx").write_bytes(content)
    with pytest.raises(ValueError, match=r"f\.xlsx: expected an Excel file, found broken data"):
        list(read_piece(Piece(tmp_path / "f.xlsx")))


@has_openpyxl
def test_an_archive_of_something_else_and_a_bomb(tmp_path: Path) -> None:
    file = tmp_path / "f.xlsx"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(ValueError, match=r"f\.xlsx: expected an Excel file, found broken data"):
        list(read_piece(Piece(file)))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", b"a" * (1 << 26) + b"b")
    with pytest.raises(ValueError, match=r"f\.xlsx: expected up to data.max_expansion = 200 times its size"):
        list(read_piece(Piece(file)))


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (tmp_path / "f.xlsx").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"f\.xlsx: reading \.xlsx needs openpyxl; pip install 'halos\[excel\]', or save"
    ):
        list(read_piece(Piece(tmp_path / "f.xlsx")))
