"""Data of a mixture whose losses take several views: records with all their examples."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from halos.data.module import PreferenceDataModule
from halos.data.preparation.needs import DataNeeds, RowNeeds
from halos.data.records.record import Completion, Record
from halos.data.rows.joint_rows import JointRows
from halos.data.sources.base import Records, Source
from halos.data.sources.mixed import MixedSource
from halos.data.streaming.module import StreamingDataModule
from halos.data.views.selection import Selection
from tests import tiny

VIEWS = (
    DataNeeds(view="binary", flags=RowNeeds(mismatched=True)),
    DataNeeds(view="pairs"),
    DataNeeds(view="demonstrations"),
)
NEEDS = DataNeeds(view="binary+pairs+demonstrations", flags=RowNeeds(mismatched=True), views=VIEWS)


class Listed(Source):
    name = "listed"

    def __init__(self, records: list[Record]) -> None:
        self.records = records

    def train(self) -> Records:
        return Records(self.records, Counter())

    def val(self) -> None:
        return None


def labelled(n: int, prompt: str, *labels: bool) -> Record:
    return Record(f"l:{n}", prompt, tuple(Completion(f"good {'day ' * k}{n}", good) for k, good in enumerate(labels)))


RECORDS = [
    Record("p:0", "hello a", (Completion("good"), Completion("bad")), ((0, 1),)),
    labelled(1, "hello b", True),
    labelled(2, "hello c", False),
    Record("d:3", "hello d", (Completion("yes"),)),
    labelled(4, "hello b", False),  # makes a pair with that of record 1
    labelled(5, "hello e", True, False),
]


def prepared(records: list[Record] = RECORDS, needs: DataNeeds = NEEDS, **options: Any) -> PreferenceDataModule:
    made = PreferenceDataModule(Listed(records), **{"max_length": 200, "cache_dir": None, **options})
    made.prepare(needs, tiny.word_tokenizer(tiny.CHATML))
    return made


def summary(made: PreferenceDataModule) -> dict[str, list[list[str]]]:
    rows = made.rows["train"].table
    return {row.id: [[own.id for own in view.rows] for view in row.views] for row in rows}


def test_a_record_has_its_examples_of_every_view() -> None:
    made = prepared()
    assert summary(made) == {
        "p:0": [["p:0#0", "p:0#1"], ["p:0#0"], ["p:0#0"]],
        # Two records whose replies make a pair are one example.
        "l:1": [["l:1#0", "l:4#0"], ["l:1#0"], ["l:1#0"]],
        "l:2": [["l:2#0"], [], []],
        "d:3": [[], [], ["d:3#0"]],
        "l:5": [["l:5#0", "l:5#1"], ["l:5#0"], ["l:5#0"]],
    }
    assert made.label_counts == (3.0, 4.0)
    counts = made.prepared.intake.reports["train"]
    assert (counts["examples"], counts["pairs: examples"], counts["binary: examples"]) == (5, 3, 7)
    assert counts["demonstrations: undesirable completions left out"] == 3


def test_the_rows_of_each_view_are_those_that_a_loss_of_it_has() -> None:
    made = prepared()
    rows = made.rows["train"].table
    assert isinstance(rows, JointRows)
    for needs, own in zip(VIEWS, rows.views, strict=True):
        assert list(own) == list(prepared(needs=needs).rows["train"].table)
    assert len(rows) == len(rows.groups) == len(rows.conversations) == 5
    per_view = [own.tokens().sum() for own in rows.views]
    assert rows.tokens().sum() == sum(per_view)
    assert rows.longest() == max(own.longest() for own in rows.views)
    assert prepared().rows["train"].table.digest() == rows.digest()
    assert prepared(RECORDS[:5]).rows["train"].table.digest() != rows.digest()


def test_batches_count_records() -> None:
    made = prepared(batch_size=2)
    made.trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1, global_rank=0)  # type: ignore[assignment]
    assert made.plan(epochs=1, max_steps=-1, accumulate=1, world_size=1) == 3
    batches = list(made.train_dataloader())
    assert [len(batch) for batch in batches] == [2, 2, 2]
    for batch in batches:
        assert [view.step.examples for view in batch.views] == [len(view) for view in batch.views]
    assert made.tokens_in(3) == sum(batch.total_tokens for batch in batches)
    assert {branch for row in made.rows_read() for branch in row.branches}


@pytest.mark.parametrize("size", [2, 4])
def test_a_limit_counts_records_too(size: int) -> None:
    needs = DataNeeds(view="binary+demonstrations", views=(DataNeeds(view="binary"), VIEWS[2]))
    found, whole = (summary(prepared(needs=needs, max_examples=most)) for most in (size, None))
    assert len(found) == size
    assert found == {name: whole[name] for name in found}


def test_a_view_without_an_example_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompt has both a desirable and an undesirable completion"):
        prepared(RECORDS[1:4])


def test_shares_are_kept_of_the_labelled_completions() -> None:
    records = [labelled(n, f"hello {'w' * n}", n % 2 == 0) for n in range(8)] + [RECORDS[0], RECORDS[5]]
    made = prepared(records, select=Selection(keep_undesirable=0.5))
    assert made.label_counts == (6.0, 3.0)
    needs = DataNeeds(view="pairs+demonstrations", views=VIEWS[1:])
    with pytest.raises(ValueError, match="for losses that learn from labels; this one learns from pairs and demonstr"):
        prepared(needs=needs, select=Selection(keep_undesirable=0.5))


def write(file: Path, *rows: dict[str, object]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_part_may_have_a_source_of_its_own(tmp_path: Path) -> None:
    chats: list[dict[str, object]] = [
        {"prompt": f"hello {n}", "completion": "good", "label": n % 2 == 0} for n in range(4)
    ]
    texts: list[dict[str, object]] = [{"prompt": f"hi {n}", "completion": "yes"} for n in range(3)]
    mix = {"a": {"train": write(tmp_path / "a.jsonl", *chats)}, "b": {"train": write(tmp_path / "b.jsonl", *texts)}}
    own = DataNeeds(view="demonstrations", source="b")
    needs = DataNeeds(view="binary+demonstrations", views=(DataNeeds(view="binary"), own))
    made = PreferenceDataModule(MixedSource(mix), max_length=200, cache_dir=None)
    rows = made.prepare(needs, tiny.word_tokenizer(tiny.CHATML)).rows["train"].table
    found = [[[one.prompt for one in view.rows] for view in row.views] for row in rows]
    # The desirable replies of the first source are no demonstrations here.
    assert [[len(view) for view in row] for row in found] == [[1, 0]] * 4 + [[0, 1]] * 3
    assert made.prepared.intake.reports["train"]["demonstrations of b: examples"] == 3
    unknown = DataNeeds(view="demonstrations", views=(DataNeeds(view="demonstrations", source="c"),))
    with pytest.raises(ValueError, match=r"^loss\.data: expected the name of a source in data\.mix \(a, b\), found c"):
        PreferenceDataModule(MixedSource(mix), cache_dir=None).prepare(unknown, tiny.word_tokenizer(tiny.CHATML))


def test_a_stream_and_an_order_by_label_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^data\.streaming: expected false for a mixture of several views"):
        StreamingDataModule(Listed(RECORDS), cache_dir=None).prepare(NEEDS, tiny.word_tokenizer(tiny.CHATML))
    with pytest.raises(ValueError, match=r"^data\.stratified: expected a loss that learns from labels"):
        prepared(stratified=True, batch_size=2).plan(epochs=1, max_steps=-1, accumulate=1, world_size=1)
    assert np.unique(prepared().rows["train"].table.labels).tolist() == [-1]
