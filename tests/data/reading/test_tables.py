"""CSV cells: what an empty one says, which are numbers, and those too long refused before they take memory."""

import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from halos.data.reading import tables
from halos.data.reading.tables import read_csv, typed
from halos.data.records.record import Completion, Record
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.sources.oasst import OasstSource

LIMIT = 1 << 16


@pytest.fixture(autouse=True)
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_CELL_CHARACTERS", LIMIT)


def test_a_cell_of_the_greatest_length_is_read(tmp_path: Path) -> None:
    file = tmp_path / "long.csv"
    file.write_text(f"prompt,completion\nx,{'y' * LIMIT}\n", encoding="utf-8")
    assert [row for _, row in read_csv(file)] == [{"prompt": "x", "completion": "y" * LIMIT}]


@pytest.mark.parametrize("cell", ["y" * (LIMIT + 1), '"' + "never closed,\n" * 500_000], ids=["long", "open quote"])
def test_a_longer_one_is_refused_in_little_memory(cell: str, tmp_path: Path) -> None:
    file = tmp_path / "long.csv"
    file.write_text(f"prompt,completion\na,b\nx,{cell}\n", encoding="utf-8")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"long\.csv:3: expected cells of up to 65,536 characters, found a long"):
            list(read_csv(file))
        assert tracemalloc.get_traced_memory()[1] < 20 * LIMIT
    finally:
        tracemalloc.stop()


def test_rows_of_several_formats_in_one_table(tmp_path: Path) -> None:
    file = tmp_path / "mixed.csv"
    file.write_text(
        "id,prompt,chosen,rejected,completion,messages,label\n"
        "x,q,a,b,,,\n,q,,,a,,true\n,q,a,,,,\n,q,,,,,false\n"
        ',,,,,"[{""role"": ""user"", ""content"": ""q""}, {""role"": ""assistant"", ""content"": ""a""}]",1\n'
    )
    found = FeedbackFiles(file).train()
    pair, labelled, conversation = found.records
    assert pair == Record(f"{file}:2", "q", (Completion("a"), Completion("b")), ((0, 1),))
    assert labelled == Record(f"{file}:3", "q", (Completion("a", True),))
    assert conversation.completions == (Completion("a", True),)
    empty = {"empty completion": 3, "completion whose pair has an empty side": 1}
    assert found.dropped == Counter(empty)


def test_an_empty_id_is_none(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text('id,prompt,completions\n,q,"[{""text"": ""a""}]"\nx,q,"[{""text"": ""a""}]"\n')
    assert [record.id for record in FeedbackFiles(file).train().records] == [f"{file}:2", "x"]


def test_trees_of_a_table(tmp_path: Path) -> None:
    file = tmp_path / "oasst.csv"
    file.write_text(
        "message_id,parent_id,role,text,rank,lang,deleted,review_result\n"
        "a,,prompter,q,,en,False,True\nb,a,assistant,good,0,en,False,True\nc,a,assistant,bad,1,en,False,False\n"
    )
    (record,) = OasstSource(file).train().records
    assert (record.completions, record.preferences) == ((Completion("good"),), ())


@pytest.mark.parametrize("name", ["score_explanation", "reward_model", "scores"])
def test_only_columns_that_a_format_has_are_numbers(name: str) -> None:
    assert typed("f:2", {name: "gpt-4", "score_chosen": "4"}) == {name: "gpt-4", "score_chosen": 4}


def test_blank_lines_before_the_header(tmp_path: Path) -> None:
    file = tmp_path / "blank.csv"
    file.write_text("\n \nprompt,completion\na,b\n\nc,d\n")
    assert list(read_csv(file)) == [
        (f"{file}:4", {"prompt": "a", "completion": "b"}),
        (f"{file}:6", {"prompt": "c", "completion": "d"}),
    ]
    file.write_text("\na,a\n1,2\n")
    with pytest.raises(ValueError, match=r"blank\.csv:2: expected every column once, found 'a' twice"):
        list(read_csv(file))
    file.write_text("\n\n")
    assert list(read_csv(file)) == []
