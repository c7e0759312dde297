"""Labels of steps in files: what is recognised, what it becomes, and what is refused."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from halos.data.layouts.layouts import to_record
from halos.data.preparation.writing import record_row
from halos.data.records.record import Completion, Record, Step
from halos.data.records.table import table_of
from halos.data.sources.feedback_files import FeedbackFiles

GOLDEN = Path(__file__).parents[1] / "golden" / "steps.jsonl"
STEPS = [{"text": "One.", "label": True}, {"text": " Two.", "label": False}]


def record(row: dict[str, Any], **options: Any) -> Record:
    _, found, _ = next(iter(FeedbackFiles("f", **options).adapted([("f:1", row)])))
    assert found is not None
    return found


def test_the_golden_file() -> None:
    found = FeedbackFiles(str(GOLDEN)).train()
    name = str(GOLDEN)
    assert list(found.records) == [
        Record(
            f"{name}:1",
            "hello",
            (
                Completion(
                    "hello world.\n\nbad and again",
                    desirable=False,
                    steps=(Step(12, True), Step(22, False), Step(27, True)),
                ),
            ),
        ),
        Record(
            f"{name}:2",
            "hello",
            (Completion("good again", desirable=True, steps=(Step(4, True), Step(10, True))),),
            weight=2.0,
        ),
        Record(f"{name}:3", "good", (Completion("world", desirable=True),)),
        Record(f"{name}:4", "world", (Completion("good and bad", steps=(Step(4, True), Step(12, False))),)),
        Record(
            "own",
            "bad",
            (Completion("good and bad", True, steps=(Step(4, True), Step(12))), Completion("bad", score=0.5)),
        ),
    ]
    (origin,) = found.origins.values()
    assert origin.columns["steps: steps"] == 3
    assert origin.noted == Counter({"steps without a label, or whose label says nothing (data.values.tie)": 1})


def test_a_declared_column_and_other_words(tmp_path: Path) -> None:
    row = {
        "question": "q",
        "solution": [{"text": "a", "label": "fine"}, {"text": "b", "label": "meh"}, {"text": "c", "label": "awful"}],
    }
    words = {"desirable": ["fine"], "undesirable": ["awful"], "tie": ["meh"]}
    made = record(row, columns={"steps": "solution"}, values=words)
    assert made.completions == (Completion("abc", steps=(Step(1, True), Step(2), Step(3, False))),)


def test_a_csv_file_has_steps_as_json(tmp_path: Path) -> None:
    file = tmp_path / "steps.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([["prompt", "steps"], ["q", json.dumps(STEPS)], ["r", json.dumps(STEPS)]])
    (first, _) = FeedbackFiles(str(file)).train().records
    assert first.completions == (Completion("One. Two.", steps=(Step(4, True), Step(9, False))),)


def test_other_columns_called_steps_are_no_steps() -> None:
    assert record({"prompt": "q", "completion": "a", "label": True, "steps": 3}).completions == (Completion("a", True),)
    names = ["click", "scroll"]
    assert record({"prompt": "q", "completion": "a", "label": 1, "steps": names}).completions[0].steps == ()


def test_what_else_a_step_has_is_listed_as_unused(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text(json.dumps({"prompt": "q", "steps": [STEPS[0] | {"author": "x"}]}) + "\n")
    (origin,) = FeedbackFiles(str(file)).train().origins.values()
    assert origin.columns["steps[].author: unused"] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"steps": "One. Two."}, "expected 'steps' to be a list of objects with 'text' and 'label', the steps of a"),
        ({"steps": []}, "expected 'steps' to be a list of objects with 'text' and 'label'"),
        ({"steps": [STEPS[0], "Two."]}, r"expected 'steps\[1\]' to be an object with 'text' and 'label'; found 'Two.'"),
        ({"steps": [STEPS[0], {"label": 1}]}, r"expected 'steps\[1\]' to be an object with 'text' and 'label'"),
        ({"steps": [STEPS[0], {"text": 2, "label": 1}]}, r"expected 'steps\[1\]\.text' to be a text; found 2"),
        ({"steps": [STEPS[0], {"text": "", "label": 1}]}, r"expected 'steps\[1\]\.text' to be a text that is not emp"),
        ({"steps": [STEPS[0], {"text": "b"}]}, r"expected 'steps\[1\]\.label' to be true/false, .*; found None"),
        ({"steps": [STEPS[0] | {"label": "maybe"}]}, r"expected 'steps\[0\]\.label' to be true/false, .*'maybe'"),
        (
            {"completion": "One.  Two.", "steps": STEPS},
            "expected the texts in 'steps' to make up the completion, found 'Two.' instead of ' Two.' at character 5; ",
        ),
        (
            {"completion": "One. Two. Three.", "steps": STEPS},
            "found '' instead of ' Three.' at character 9; write line breaks and spaces into the steps too",
        ),
    ],
)
def test_bad_steps_name_the_place_what_was_expected_and_what_was_found(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^f:1: .*{message}"):
        record({"prompt": "q"} | row, columns={"steps": "steps"})


def test_bad_steps_of_this_projects_format() -> None:
    row = {"prompt": "q", "completions": [{"text": "One. Two", "steps": STEPS}]}
    with pytest.raises(ValueError, match=r"^f:1: expected the texts in 'completions\[0\]\.steps' to make up the comp"):
        to_record("f:1", row, Counter())
    turns = [{"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
    with pytest.raises(ValueError, match=r"^f:1: expected a reply that is a text with 'completions\[0\]\.steps'"):
        to_record("f:1", {"prompt": "q", "completions": [{"messages": turns, "steps": STEPS}]}, Counter())


def test_bad_rows_are_counted_where_they_may_be_skipped(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    rows = [{"prompt": "q", "steps": STEPS}, {"prompt": "q", "completion": "x", "steps": STEPS}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = FeedbackFiles(str(file), bad_rows="skip").train()
    assert len(found.records) == 1
    assert sum(found.dropped.values()) == 1


@pytest.mark.parametrize("stops", [(4,), (4, 4, 9), (9, 4), (4, 10), (0, 9)])
def test_steps_that_do_not_make_up_a_reply_are_no_record(stops: tuple[int, ...]) -> None:
    steps = tuple(Step(stop, True) for stop in stops)
    with pytest.raises(ValueError, match=r"^x: expected steps that end at ascending places of a completion that is a"):
        Record("x", "q", (Completion("One. Two.", steps=steps),))


def test_records_keep_their_steps_in_tables_and_in_files() -> None:
    records = list(FeedbackFiles(str(GOLDEN)).train().records)
    assert list(table_of(records)) == records
    for one in records:
        assert to_record("f:1", json.loads(json.dumps(record_row(one))), Counter()) == one


def test_rows_with_steps_are_not_combined_with_rows_that_disagree(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    row = {"prompt": "q", "steps": STEPS}
    file.write_text("".join(json.dumps(row | {"label": label}) + "\n" for label in (True, False, True)))
    assert [one.completions[0].desirable for one in FeedbackFiles(str(file)).train().records] == [True, False, True]
