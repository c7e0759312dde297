"""Preparation of labels of steps: examples, weights, counts, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from halos.data.module import PreferenceDataModule
from halos.data.preparation.needs import DataNeeds, RowNeeds
from halos.data.records.record import Completion, Record, Step
from halos.data.rows.joint_rows import JointRows
from halos.data.rows.token_rows import Row
from halos.data.streaming.module import StreamingDataModule
from halos.data.views.derive import VIEWS
from halos.objectives import KTO
from tests import tiny
from tests.data.preparation.test_join_views import Listed

NEEDS = DataNeeds(view="binary", flags=RowNeeds(mismatched=True, step_labels=True))
REPLY = "hello world. bad and again"
LONG = Completion(REPLY, True, steps=(Step(12, True), Step(16, False), Step(26, True)))
RECORDS = [
    Record("a", "hello", (LONG,), weight=3.0),
    Record("b", "good", (Completion("good and bad", None, steps=(Step(4, True), Step(12))),)),
    Record("c", "world", (Completion("good", False), Completion("bad"))),
]


def prepared(records: list[Record] = RECORDS, needs: DataNeeds = NEEDS, **options: Any) -> PreferenceDataModule:
    made = PreferenceDataModule(Listed(records), **{"max_length": 200, "cache_dir": None, **options})
    made.prepare(needs, tiny.bpe_tokenizer(tiny.CHATML))
    return made


def rows_of(made: PreferenceDataModule) -> list[Row]:
    return list(made.prepared.rows["train"].table)


def test_a_labelled_step_is_an_example_beside_the_whole_reply() -> None:
    made = prepared()
    rows = rows_of(made)
    assert [(row.id, row.desirable) for row in rows] == [
        ("a#0", True),
        ("a#1", True),
        ("a#2", False),
        ("a#3", True),
        ("b#0", True),
        ("c#0", False),
    ]
    # One for the outcome; the steps of a reply share one. A step without a label has no part in it.
    assert [row.weight for row in rows] == pytest.approx([3.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert made.prepared.label_counts == pytest.approx((6.0, 2.0))
    counts = made.prepared.intake.reports["train"]
    assert counts["steps with a label"] == 4
    assert counts["completions without feedback left out"] == 1
    assert counts["examples"] == 6


@pytest.mark.parametrize("cache", [False, True])
def test_steps_that_are_cut_or_have_no_token_are_counted_and_left_out(cache: bool, tmp_path: Path) -> None:
    # The first two steps of "d" are within its first token.
    inside = Record("d", "again", (Completion("hello", None, steps=(Step(2, True), Step(4, True), Step(5, False))),))
    records = [*RECORDS, inside]
    folder: dict[str, Any] = {"cache_dir": tmp_path} if cache else {}
    whole = rows_of(prepared(records, **folder))
    assert [row.id for row in whole if row.id.startswith("d")] == ["d#2"]
    cut = max(len(row.prompt) + len(row.branches[0]) for row in whole) - 1
    made = prepared(records, max_length=cut, max_prompt_length=cut - 1, **folder)
    assert [row.id for row in rows_of(made)] == [row.id for row in whole if row.id != "a#3"]
    counts = made.prepared.intake.reports["train"]
    assert counts["steps cut by data.max_length left out"] == 1
    assert counts["steps without a token of their own left out"] == 2
    assert counts["completions truncated"] == 1  # the whole reply of "a" is kept up to the limit
    assert made.prepared.label_counts == pytest.approx((3 + 1 + 1, 1 + 1 + 1 / 3))


def test_other_losses_say_that_they_do_not_use_them() -> None:
    counts = prepared(needs=DataNeeds(view="binary", flags=RowNeeds(mismatched=True))).prepared.intake.reports["train"]
    assert counts["completions whose labels of steps are not used (loss.step_labels)"] == 2
    assert counts["completions with labels of steps alone left out"] == 1
    assert counts["examples"] == 2


@pytest.mark.parametrize(
    ("view", "ids"), [("demonstrations", ["a#0", "c#0"]), ("scored", ["a#0", "c#0"]), ("binary", ["a#0", "c#0"])]
)
def test_other_views_take_the_reply_with_its_overall_judgement(view: str, ids: list[str]) -> None:
    records = [*RECORDS[:2], Record("c", "world", (Completion("good"), Completion("bad", False)))]
    if view != "demonstrations":
        records[2] = RECORDS[2]
    made = VIEWS[view](records)
    assert [example.id for example in made.examples] == ids
    assert made.report["completions with labels of steps alone left out"] == 1


def test_steps_are_rows_of_records_in_a_mixture_too() -> None:
    views = (NEEDS, DataNeeds(view="demonstrations"))
    made = prepared(needs=DataNeeds(view="binary+demonstrations", flags=RowNeeds(mismatched=True), views=views))
    rows = made.prepared.rows["train"].table
    assert isinstance(rows, JointRows)
    record = rows[0]
    assert [(one.id, one.scored(0)[0]) for one in record.views[0].rows] == [
        ("a#0", 0),
        ("a#1", 0),
        ("a#2", 3),
        ("a#3", 4),
    ]
    assert [one.id for one in record.views[1].rows] == ["a#0"]
    assert made.prepared.intake.reports["train"]["binary: steps with a label"] == 4


def test_data_without_labels_of_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^loss\.step_labels: expected completions whose steps have labels"):
        prepared([RECORDS[2], Record("e", "hello", (Completion("good", True),))])


def test_a_limit_that_cuts_every_step_is_refused() -> None:
    records = [Record(name, name, (Completion(REPLY, steps=(Step(26, True),)),)) for name in ("hello", "good")]
    assert all(len(row.branches[0]) > 4 for row in rows_of(prepared(records)))
    with pytest.raises(
        ValueError, match=r"^data\.max_length: expected a step that fits into 12 tokens with its prompt"
    ):
        prepared(records, max_length=12, max_prompt_length=8)


def test_a_stream_of_steps_is_refused() -> None:
    made = StreamingDataModule(Listed(RECORDS), max_length=200, cache_dir=None)
    with pytest.raises(
        ValueError, match=r"^data\.streaming: expected false for a loss that learns from labels of steps"
    ):
        made.prepare(NEEDS, tiny.bpe_tokenizer(tiny.CHATML))


def test_the_loss_asks_for_them() -> None:
    assert KTO(step_labels=True).data_needs().form == "steps"
    assert KTO().data_needs().form == "binary"
    assert KTO(step_labels=True).data_needs().key() != KTO().data_needs().key()
    assert Counter(VIEWS["steps"](RECORDS).report)["steps with a label"] == 4
