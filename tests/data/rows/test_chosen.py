"""Rows of several tables."""

from collections import Counter

import numpy as np

from halos.data.preparation.needs import DataNeeds
from halos.data.records.record import Completion, Message, Record
from halos.data.rows.chosen import ChosenRows
from tests import tiny
from tests.data.test_module import Listed, PreferenceDataModule


def record(n: int, *turns: str) -> Record:
    messages = tuple(Message("assistant" if place % 2 else "user", text) for place, text in enumerate(turns))
    return Record(f"f:{n}", messages, (Completion("good " * (n + 1), n % 2 == 0),))


def test_rows_of_a_conversation_follow_each_other() -> None:
    records = [
        record(0, "hello"),
        record(1, "hello world"),
        record(2, "good"),
        record(3, "hello", "good", "world"),
        record(4, "good"),
        record(5, "hello"),
    ]
    made = PreferenceDataModule(Listed(records), max_length=200)
    rows = made.prepare(DataNeeds(view="binary"), tiny.word_tokenizer(tiny.CHATML)).rows["train"].table
    chosen = ChosenRows([(rows, np.arange(6)), (rows, np.array([1, 3, 5]))])
    assert [row.id for row in chosen] == [f"f:{n}#0" for n in (0, 3, 5, 1, 2, 4, 3, 5, 1)]
    assert len(chosen) == 9
    assert Counter(row.id for row in chosen)["f:5#0"] == 2
    assert rows[4] in chosen
