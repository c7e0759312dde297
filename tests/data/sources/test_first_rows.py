"""What is checked of a run's files before anything slow is imported: their first rows, with the errors of reading."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from halos.data.reading import files
from halos.data.sources.base import Source
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.sources.file_source import FIRST_ROWS, FileSource
from halos.data.sources.hh import HHSource
from halos.data.sources.mixed import MixedSource
from halos.data.sources.oasst import OasstSource

GOOD = {"prompt": "a", "completion": "b", "label": True}
BAD: dict[str, str] = {
    "rows.txt": "",
    "rows.jsonl": '{"prompt": "a", ',
    "rows.json": '[{"prompt": "a", "completion": "b", "label": true},]',
    "more.json": json.dumps([GOOD, {"prompt": "a", "completion": "b", "label": "perhaps"}]),
    "columns.csv": "foo,bar\na,b\n",
    "rows_of_none.jsonl": "",
    "types.jsonl": json.dumps({**GOOD, "prompt": 3}),
}


def error_of(source: Source, call: str) -> str:
    with pytest.raises(ValueError, match=r"rows|more|columns|types") as caught:
        getattr(source, call)()
    return str(caught.value)


@pytest.mark.parametrize("name", [*BAD, "rows_that_are_not_there.jsonl", "rows*.csv"])
def test_errors_are_those_of_reading_all(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name in BAD:
        file.write_text(BAD[name])
    assert error_of(FeedbackFiles(str(file)), "check_first_rows") == error_of(FeedbackFiles(str(file)), "train")
    mixed = {"mine": {"train": str(file)}}
    assert error_of(MixedSource(mixed), "check_first_rows") == error_of(MixedSource(mixed), "train")


def write(file: Path, rows: Sequence[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_validation_files_are_checked_too(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.jsonl", [GOOD]), write(tmp_path / "types.jsonl", [{**GOOD, "prompt": 3}])
    source = FeedbackFiles(good, bad)
    assert error_of(source, "check_first_rows") == error_of(source, "val")


def test_what_comes_later_is_left_to_reading(tmp_path: Path) -> None:
    rows: list[Any] = [{**GOOD, "prompt": str(n)} for n in range(FIRST_ROWS)]
    file = write(tmp_path / "rows.jsonl", [*rows, {"prompt": "a"}])
    FeedbackFiles(file).check_first_rows()
    assert f"{file}:{FIRST_ROWS + 1}" in error_of(FeedbackFiles(file), "train")
    file = write(tmp_path / "rows2.jsonl", [*rows[1:], {"prompt": "a"}])
    assert f"{file}:{FIRST_ROWS}" in error_of(FeedbackFiles(file), "check_first_rows")


def test_malformed_rows_that_may_be_skipped_are(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [GOOD, {"prompt": "a"}])
    FeedbackFiles(file, bad_rows="skip").check_first_rows()


def test_rows_that_belong_together_are_parsed_but_not_adapted(tmp_path: Path) -> None:
    message = {"message_id": "1", "parent_id": "0", "text": "a", "role": "assistant", "message_tree_id": "0"}
    file = write(tmp_path / "rows.jsonl", [message])
    OasstSource(file).check_first_rows()
    (tmp_path / "rows.jsonl").write_text("{")
    assert "rows.jsonl:1" in error_of(OasstSource(file), "check_first_rows")


def test_a_large_file_that_is_read_whole_is_not_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more.json").write_text(BAD["more.json"])
    monkeypatch.setattr(files, "SMALL", 10)
    FeedbackFiles(str(tmp_path / "more.json")).check_first_rows()


@pytest.mark.parametrize("name", ["Anthropic/hh-rlhf:train", "folder"])
def test_data_sets_are_not_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)

    def rows(self: FileSource, piece: object, *, streaming: bool = False) -> Iterator[Any]:
        raise AssertionError

    monkeypatch.setattr(FileSource, "rows", rows)
    HHSource(name).check_first_rows()
