"""A table of reference log-probs, asked by rows."""

import pytest
import torch

from halos.data.batches.collate import collate
from halos.data.batches.reference_table import ReferenceTable, completions, entry_key
from halos.data.rows.token_rows import Row

A = Row("a", 0, (1, 2), ((3, 4), (5,)))
B = Row("b", 1, (1,), ((2, 3, 4), (5,)))


def table(*rows: Row) -> ReferenceTable:
    return ReferenceTable(
        {key: -torch.arange(1.0, len(row.scored(0)) + 1) / len(row.prompt) for key, row in completions(rows).items()}
    )


def test_the_boundary_between_prompt_and_completion_is_part_of_the_key() -> None:
    keys = [entry_key((1, 2), (3,)), entry_key((1,), (2, 3)), entry_key((1, 2, 3), ()), entry_key((1, 2), (4,))]
    assert len(set(keys)) == 4
    assert entry_key((1, 2), (3,)) == keys[0]


def test_each_completion_is_listed_once_and_those_of_a_prompt_together() -> None:
    rows = [A, B, Row("c", 0, (1, 2), ((5,), (6,)))]
    assert [(row.prompt, *row.branches) for row in completions(rows).values()] == [
        ((1,), (2, 3, 4)),
        ((1,), (5,)),
        ((1, 2), (3, 4)),
        ((1, 2), (5,)),
        ((1, 2), (6,)),
    ]


def test_it_fills_the_grid_of_a_batch() -> None:
    expected = [[[-0.5, -1.0, 0.0], [-0.5, 0.0, 0.0]], [[-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0]]]
    assert table(A, B).logprobs([A, B], 3).tolist() == expected
    batch = collate([A, B], reference=table(A, B))
    assert batch.reference is not None
    assert batch.reference.tolist() == expected
    assert batch.to("cpu").reference.tolist() == expected


def test_which_tokens_are_scored_is_part_of_the_key() -> None:
    a = Row("a", 0, (1, 2), ((3, 4, 5, 6), (5,)), context=(((1, 3),), ()))
    every = Row("every", 0, (1, 2), ((3, 4, 5, 6),))
    listed = completions([a, every])
    assert len(listed) == 3
    assert [(row.branches[0], list(row.scored(0))) for row in listed.values()] == [
        ((3, 4, 5, 6), [0, 3]),
        ((3, 4, 5, 6), [0, 1, 2, 3]),
        ((5,), [0]),
    ]
    assert table(a).logprobs([a], 2).tolist() == [[[-0.5, -1.0], [-0.5, 0.0]]]


def test_no_precision_plugin_rounds_them() -> None:
    from lightning.pytorch.plugins import HalfPrecision

    third = ReferenceTable({entry_key(A.prompt, ids): torch.full((len(ids),), 1 / 3) for ids in A.branches})
    batch = HalfPrecision("bf16-true").convert_input(collate([A], packing=True, reference=third))
    assert batch.reference[0, 1, 0] == torch.tensor(1 / 3)


def test_batches_have_none_unless_given() -> None:
    assert collate([A]).reference is None


def test_a_completion_that_it_lacks_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="b: expected the reference's log-probs of completion 0, found none"):
        table(A).logprobs([A, B], 3)
