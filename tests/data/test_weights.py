"""Weights, margins and graded feedback, from records to batches."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from halos.data.batches.batch import StepSize
from halos.data.batches.collate import collate, step_size
from halos.data.module import PreferenceDataModule
from halos.data.preparation.needs import DataNeeds
from halos.data.preparation.writing import example_row, record_row
from halos.data.records.record import Completion, Message, Record
from halos.data.records.table import table_of
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.token_rows import Row
from halos.data.rows.tokenise import few_rows, make_rows
from halos.data.store.arrow import MEMORY
from halos.data.views.derive import VIEWS, of_run
from halos.data.views.examples import Pair
from halos.data.views.turns import expand_turns
from tests import tiny
from tests.data.test_module import Listed

TOKENS = ChatTokens(tiny.word_tokenizer(tiny.CHATML), Limits(64))
PREFERRED = Record("p", "q", (Completion("a", score=1.0), Completion("b", score=4.5)), ((1, 0),), 2.5, 0.75)
GOOD = Record("g", "q", (Completion("good", True),), weight=3.0)
BAD = Record("b", "q", (Completion("bad", False),), weight=0.5)
PLAIN = Record("x", "r", (Completion("yes", True, 2.0), Completion("no", False)))
RECORDS = [PREFERRED, GOOD, BAD, PLAIN]


def test_weights_and_margins_come_back_from_a_table() -> None:
    assert list(table_of(RECORDS)) == RECORDS


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_is_a_finite_number_above_0(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"^r: expected a finite weight above 0, found {weight}$"):
        Record("r", "q", (Completion("a"),), weight=weight)


@pytest.mark.parametrize("margin", [math.nan, -math.inf])
def test_a_margin_is_a_finite_number(margin: float) -> None:
    with pytest.raises(ValueError, match=rf"^r: expected a finite margin, found {margin}$"):
        Record("r", "q", (Completion("a"), Completion("b")), ((0, 1),), margin=margin)


def test_weights_and_margins_are_written_where_there_are_any() -> None:
    row = record_row(PREFERRED)
    assert (row["weight"], row["margin"]) == (2.5, 0.75)
    assert not {"weight", "margin"} & record_row(PLAIN).keys()
    (pair,) = VIEWS["pairs"]([PREFERRED]).examples
    written = json.loads(json.dumps(example_row(pair)))
    assert (written["weight"], written["margin"]) == (2.5, 0.75)
    assert [completion["score"] for completion in written["completions"]] == [4.5, 1.0]


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_has_the_weights_of_its_records(view: str) -> None:
    examples = VIEWS[view](RECORDS).examples
    # A pair of two records has the smaller weight.
    weights = {record.id: record.weight for record in RECORDS} | ({"g": BAD.weight} if view == "pairs" else {})
    expected = [weights[example.id[0]] for example in examples]
    assert [example.weight for example in examples] == examples.weights.tolist() == expected
    order = np.arange(len(examples))[::-1]
    assert examples.take(order).weights.tolist() == expected[::-1]


def test_pairs_have_the_margin_of_their_preference_and_the_scores_of_their_sides() -> None:
    assert list(VIEWS["pairs"](RECORDS).examples) == [
        Pair("p#0", "q", "b", "a", 2.5, 0.75, 4.5, 1.0),
        Pair("g#0", "q", "good", "bad", 0.5),
        Pair("x#0", "r", "yes", "no", score_chosen=2.0),
    ]


def test_a_pair_from_labels_does_not_have_the_margin_of_the_records_preference() -> None:
    completions = (Completion("a"), Completion("b"), Completion("c", True), Completion("d", False))
    record = Record("r", "q", completions, ((0, 1),), margin=2.0)
    assert [pair.margin for pair in VIEWS["pairs"]([record]).examples if isinstance(pair, Pair)] == [2.0, None]


@pytest.mark.parametrize("view", VIEWS)
def test_a_stream_gives_the_same_examples(view: str) -> None:
    run = [record for record in RECORDS if record.prompt == "q"]
    examples, _ = of_run(view, run)
    assert examples == list(VIEWS[view](run).examples)


def test_earlier_turns_have_the_weight_of_their_conversation() -> None:
    prompt = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    record = Record("r", prompt, (Completion("d"),), weight=3.0)
    turns = (Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    several = Record("s", "a", (Completion.of(turns),), weight=4.0)
    expanded, _ = expand_turns(table_of([record, several]), MEMORY)
    assert [r.weight for r in expanded] == [3.0, 3.0, 4.0, 4.0]


def rows_of(view: str, records: Sequence[Record]) -> list[Row]:
    return list(make_rows(VIEWS[view](records).examples, TOKENS).table)


def test_rows_have_weights_margins_and_scores() -> None:
    first, second, third = rows_of("pairs", RECORDS)
    assert (first.weight, first.margin, first.score_chosen, first.score_rejected) == (2.5, 0.75, 4.5, 1.0)
    assert (second.weight, second.margin, second.score_chosen, second.score_rejected) == (0.5, None, None, None)
    assert (third.weight, third.margin, third.score_chosen, third.score_rejected) == (1.0, None, 2.0, None)
    assert [row.weight for row in rows_of("binary", RECORDS)] == [2.5, 2.5, 3.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("view", VIEWS)
def test_rows_made_in_memory_are_the_same(view: str) -> None:
    examples = list(VIEWS[view](RECORDS).examples)
    assert few_rows(examples, (), TOKENS, lambda _: "")[0] == rows_of(view, RECORDS)


@pytest.mark.parametrize("other", [replace(PREFERRED, weight=2.0), replace(PREFERRED, margin=0.5)])
def test_the_key_of_rows_changes_with_weights_and_margins(other: Record) -> None:
    keys = {make_rows(VIEWS["pairs"]([record]).examples, TOKENS).table.digest() for record in (PREFERRED, other)}
    assert len(keys) == 2


def test_a_batch_has_the_weights_margins_and_scores() -> None:
    batch = collate(rows_of("pairs", RECORDS))
    for column, expected in (
        (batch.weights, [2.5, 0.5, 1.0]),
        (batch.margins, [0.75, math.nan, math.nan]),
        (batch.scores_chosen, [4.5, math.nan, 2.0]),
        (batch.scores_rejected, [1.0, math.nan, math.nan]),
    ):
        assert column is not None
        torch.testing.assert_close(column, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_a_batch_without_weights_has_none() -> None:
    assert collate(rows_of("pairs", [PLAIN])).weights is None
    batch = collate(rows_of("binary", RECORDS), mismatched=False)
    assert batch.margins is batch.scores_chosen is batch.scores_rejected is None


def test_y_is_not_the_other_side_of_a_pair() -> None:
    rows = [Row(str(n), n, (1,), ((2,), (3,)), desirable=True) for n in range(2)]
    assert collate(rows, mismatched=True).margins is None


def test_precision_plugins_do_not_round_weights() -> None:
    row = Row("r", 0, (1,), ((2,), (3,)), weight=1 + 2**-20, margin=1 + 2**-20)
    batch = collate([row])
    assert all(value.dtype == torch.int32 for value in (batch.weight_bits, batch.graded_bits) if value is not None)
    moved = batch.to("cpu")
    assert moved.weights is not None
    assert moved.margins is not None
    assert moved.weights.tolist() == moved.margins.tolist() == [1 + 2**-20]


def test_the_size_of_a_step_counts_by_weight() -> None:
    rows = [replace(row, weight=weight) for row, weight in zip(tiny.rows(3), (2.0, 1.0, 0.5), strict=True)]
    lengths = [len(row.branches[0]) for row in rows]
    tokens = 2 * lengths[0] + lengths[1] + lengths[2] / 2
    assert step_size([replace(row, score=None) for row in rows]) == StepSize(3.5, (tokens,))
    scored = [replace(row, score=1.0) for row in rows]
    assert step_size(scored).weights == (2.0, 1.0, 0.5)
    assert step_size([replace(row, weight=1.0) for row in scored]).weights == ()


def test_label_counts_count_weights() -> None:
    data = PreferenceDataModule(Listed(RECORDS), cache_dir=None)
    data.prepare(DataNeeds(view="binary"), TOKENS.tokenizer)
    assert data.label_counts == (2.5 + 3.0 + 1.0, 2.5 + 0.5 + 1.0)
    assert data.prepared.intake.reports["train"]["examples with a weight"] == 4
