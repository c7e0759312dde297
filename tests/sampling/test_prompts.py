"""Prompts to sample for: each once, drawn with the seed, in the order of the records."""

from typing import Any

import pytest

from halos.data.preparation.prepare import Preparation
from halos.data.records.record import Completion, Record
from halos.data.rows.chat_tokens import Limits
from halos.sampling.prompts import SourcePrompt, distinct_prompts, read_split
from halos.toy.source import ToySource

RECORDS = [Record(f"f:{n + 1}", f"q{n % 5}", (Completion(f"a{n}"),)) for n in range(12)]


def test_each_prompt_is_drawn_once() -> None:
    expected = [SourcePrompt(f"f:{n + 1}", f"q{n}") for n in range(5)]
    assert distinct_prompts(RECORDS, None, 0) == distinct_prompts(RECORDS, 9, 0) == expected
    drawn = distinct_prompts(RECORDS, 3, 0)
    assert len(drawn) == 3
    assert drawn == [asked for asked in expected if asked in drawn]
    assert any(distinct_prompts(RECORDS, 3, seed) != drawn for seed in range(1, 9))


def test_no_prompts_are_an_error() -> None:
    with pytest.raises(ValueError, match="split: expected records with prompts, found none"):
        distinct_prompts([], None, 0)


@pytest.mark.parametrize("size", [True, 1.5, 0, "3"])
def test_a_size_that_is_no_whole_number_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=r"size: expected a whole number from 1 on or null, found"):
        distinct_prompts(RECORDS, size, 0)


def test_a_split_of_a_source_needs_no_configuration() -> None:
    source = ToySource(size=8, val_size=4)
    preparation = Preparation(source=source, limits=Limits(64))
    held = read_split(preparation, "val")
    assert [record.id for record in held.records] == [record.id for record in source.val().records]
    assert len(held.training) == len(source.train().records)
    with pytest.raises(ValueError, match="split: expected val or train, found 'test'"):
        read_split(preparation, "test")
