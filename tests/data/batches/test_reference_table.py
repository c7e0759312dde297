"""A table of reference log-probs, asked by rows."""

import random
import tracemalloc
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.batches.reference_table import KEY_BYTES, Entries, ReferenceTable, completions, entry_key
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


# Entries


def entries_of(values: Mapping[bytes, Tensor]) -> Entries:
    keys = np.frombuffer(b"".join(values), np.uint8).reshape(-1, KEY_BYTES)
    lengths = np.array([len(entry) for entry in values.values()], np.int64)
    return Entries.of(keys, lengths, torch.cat([torch.zeros(0), *values.values()]))


def drawn(count: int, rng: random.Random) -> dict[bytes, Tensor]:
    # Keys of which many have one of two beginnings, and values of which some are empty.
    heads = [bytes(8), b"\xff" * 8, *(rng.randbytes(8) for _ in range(count // 2))]
    return {rng.choice(heads) + rng.randbytes(8): torch.rand(rng.randrange(4)) for _ in range(count)}


def assert_same(found: Mapping[bytes, Tensor], expected: Mapping[bytes, Tensor]) -> None:
    assert len(found) == len(expected)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], entry) for key, entry in expected.items())


@pytest.mark.parametrize("seed", range(4))
def test_entries_are_a_dict_of_tensors(seed: int) -> None:
    rng = random.Random(seed)
    one, other = drawn(40, rng), drawn(40, rng)
    again = {key: entry + 1 for key, entry in list(one.items())[:10]}
    joined = Entries.joined(map(entries_of, (one, other, again)))
    expected = one | other | again
    assert_same(joined, expected)
    assert list(joined) == sorted(expected)
    wanted = [*list(expected)[::3], rng.randbytes(16), bytes(16)]
    assert_same(joined.only(wanted), {key: expected[key] for key in wanted if key in expected})
    assert_same(Entries.of(*joined.packed()), expected)
    assert_same(Entries.joined([joined.only(wanted), joined]), expected)
    absent = [rng.randbytes(16), bytes(8) + rng.randbytes(8), b"\xff" * 16]
    assert not any(key in joined for key in absent)
    with pytest.raises(KeyError):
        joined[absent[0]]


def test_there_may_be_none() -> None:
    none = Entries.joined([])
    assert not none
    assert bytes(16) not in none
    assert_same(Entries.of(*none.packed()), {})
    assert_same(none.only([bytes(16)]), {})


def test_an_entry_takes_little_memory() -> None:
    count, values = 20_000, torch.zeros(20_000)
    keys = np.frombuffer(random.Random(0).randbytes(16 * count), np.uint8).reshape(-1, KEY_BYTES)
    tracemalloc.start()
    entries = Entries.of(keys, np.ones(count, np.int64), values)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(entries) == count
    assert size < 45 * count
