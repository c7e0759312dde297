"""Log-probs by key."""

import os
import random
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from halos.data.batches import reference_entries as entries_module
from halos.data.batches.reference_entries import KEY_BYTES, Entries, GrowingEntries


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
    assert_same(Entries.of(*joined.serialised()), expected)
    assert_same(Entries.joined([joined.only(wanted), joined]), expected)
    absent = [rng.randbytes(16), bytes(8) + rng.randbytes(8), b"\xff" * 16]
    assert not any(key in joined for key in absent)
    with pytest.raises(KeyError):
        joined[absent[0]]


def test_there_may_be_none() -> None:
    none = Entries.joined([])
    assert not none
    assert bytes(16) not in none
    assert_same(Entries.of(*none.serialised()), {})
    assert_same(none.only([bytes(16)]), {})


@pytest.mark.parametrize("in_memory", [1, 7, 1 << 20])
@pytest.mark.parametrize("seed", range(3))
def test_growing_entries_are_a_dict_that_is_updated(
    in_memory: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries_module, "IN_MEMORY", in_memory)
    rng = random.Random(seed)
    growing, expected = GrowingEntries(tmp_path), dict[bytes, Tensor]()
    assert_same(growing.joined(), {})
    for size in (0, 3, 40, 1, 1, 1, 25, 12, 2):
        block = drawn(size, rng) | {key: torch.rand(2) for key in list(expected)[: size // 2]}
        growing.add(entries_of(block))
        expected |= block
        assert all(key in growing for key in expected)
        assert rng.randbytes(KEY_BYTES) not in growing
    joined = growing.joined()
    assert_same(joined, expected)
    assert list(joined) == sorted(expected)
    assert not list(tmp_path.iterdir())


def many(count: int) -> Entries:
    keys = np.frombuffer(random.Random(0).randbytes(16 * count), np.uint8).reshape(-1, KEY_BYTES)
    return Entries.of(keys, np.ones(count, np.int64), torch.arange(float(count)))


def test_a_large_index_is_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 20_000
    entries = many(count)
    tracemalloc.start()
    in_memory = Entries.joined([entries, entries])
    size, _ = tracemalloc.get_traced_memory()
    assert 40 * count <= size < 100 * count
    tracemalloc.clear_traces()
    monkeypatch.setattr(entries_module, "IN_MEMORY", 1000)
    growing = GrowingEntries(tmp_path)
    growing.add(entries)
    growing.add(entries)
    mapped = growing.joined()
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < count
    assert peak < 20 * count
    assert np.array_equal(mapped.words, in_memory.words)
    assert np.array_equal(mapped.places, in_memory.places)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), AttributeError("posix_fallocate")])
def test_without_room_on_the_disk_the_index_is_in_memory(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: int) -> None:
        raise error

    monkeypatch.setattr(os, "posix_fallocate", refused)
    monkeypatch.setattr(entries_module, "IN_MEMORY", 10)
    entries = many(100)
    assert_same(Entries.joined([entries], tmp_path), dict(entries))
    assert "index is in memory" in caplog.text
    assert not list(tmp_path.iterdir())


def test_an_entry_takes_little_memory() -> None:
    count = 20_000
    keys = np.frombuffer(random.Random(0).randbytes(16 * count), np.uint8).reshape(-1, KEY_BYTES)
    values = torch.zeros(count)
    tracemalloc.start()
    entries = Entries.of(keys, np.ones(count, np.int64), values)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(entries) == count
    assert size < 45 * count
