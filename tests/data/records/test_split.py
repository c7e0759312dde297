"""Held-out prompts."""

import pytest

from halos.data.records.record import Completion, Message, Record, prompt_key
from halos.data.records.split import split_by_prompt

# 20 prompts, prompt p with 1 + p % 3 records, scattered; some as a lone user turn, which is the same prompt.
RECORDS = [
    Record(f"{p}.{copy}", f"q{p}" if copy else (Message("user", f"q{p}"),), (Completion("a"),))
    for copy in range(3)
    for p in range(20)
    if copy <= p % 3
]


@pytest.mark.parametrize("val_size", [1, 5, 20])
def test_no_prompt_is_on_both_sides(val_size: int) -> None:
    train, val = split_by_prompt(RECORDS, val_size, seed=0)
    assert val_size <= len(val) <= val_size + 2
    assert not {prompt_key(r.prompt) for r in train} & {prompt_key(r.prompt) for r in val}
    assert sorted([*train, *val], key=RECORDS.index) == RECORDS
    assert train == sorted(train, key=RECORDS.index)
    assert val == sorted(val, key=RECORDS.index)


def test_the_seed_decides_and_the_order_of_the_records_does_not() -> None:
    _, val = split_by_prompt(RECORDS, 10, seed=0)
    assert split_by_prompt(RECORDS, 10, seed=0)[1] == val
    assert split_by_prompt(RECORDS, 10, seed=1)[1] != val
    assert {r.id for r in split_by_prompt(RECORDS[::-1], 10, seed=0)[1]} == {r.id for r in val}


def test_nothing_held_out() -> None:
    assert split_by_prompt(RECORDS, 0, seed=0) == (RECORDS, [])


def test_sizes_that_make_no_sense() -> None:
    with pytest.raises(
        ValueError, match=f"data.val_size: expected records to remain to train on; found 99 of {len(RECORDS)}"
    ):
        split_by_prompt(RECORDS, 99, seed=0)
    with pytest.raises(ValueError, match="remain to train on; found 1 of 2 records with 1 different prompts"):
        split_by_prompt([RECORDS[1], RECORDS[20]], 1, seed=0)
    for size in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"data.val_size: expected a whole number from 0 on, found {size}"):
            split_by_prompt(RECORDS, size, seed=0)  # type: ignore[arg-type]
