"""Log-probs by key, for more completions than fit into memory.

The index has 40 bytes for each entry and is sorted by key. A large index is in a temporary file that is memory-mapped.
The log-probs themselves may be memory-mapped too.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from struct import unpack
from typing import Self

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

KEY_BYTES = 16
ENTRY_BYTES = 40
IN_MEMORY = 1 << 20
"""The largest number of entries whose index is in memory. Also the number of entries that are sorted at a time."""

Serialised = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Keys [n, 16] uint8, the number of values of each [n] int64, and all values one after the other, float32."""


class Entries(Mapping[bytes, Tensor]):
    """Log-probs by key. An entry takes 40 bytes besides its values; in a dict of tensors it would take 500.

    Attributes:
        words: the first and the second halves of the n keys [2, n] uint64, sorted by key. Each half is contiguous,
            because a search would otherwise copy it.
        places: for each entry its part, its beginning in the part, and its length [n, 3] int64.
        parts: flat float32 tensors of log-probs, which may be memory-mapped.
    """

    def __init__(self, words: np.ndarray, places: np.ndarray, parts: Sequence[Tensor]) -> None:
        self.words, self.places, self.parts = words, places, tuple(parts)

    @classmethod
    def of(cls, keys: np.ndarray, lengths: np.ndarray, values: Tensor | np.ndarray) -> Self:
        """Make entries of keys [n, 16] uint8, the number of values of each, and all values one after the other."""
        places = np.stack([np.zeros_like(lengths), np.cumsum(lengths) - lengths, lengths], axis=1)
        return cls(*_sorted(_words(keys), places), [torch.as_tensor(values)])

    @classmethod
    def joined(cls, several: Iterable[Entries], folder: Path | None = None) -> Self:
        """Join entries. Of entries with equal keys the last one is kept.

        Args:
            several: the entries.
            folder: the folder for a large index; None: the index is in memory.
        """
        listed: list[Entries] = [cls(*_arrays(0, None), ()), *several]
        count = sum(map(len, listed))
        words, places = _arrays(count, folder)
        first_parts = np.cumsum([0, *(len(entries.parts) for entries in listed)])
        end = 0
        for of_range in _key_ranges(listed, count):
            slices = list(zip(listed, first_parts.tolist(), of_range, strict=False))
            found = _sorted(
                np.concatenate([entries.words[:, own] for entries, _, own in slices], axis=1),
                np.concatenate([entries.places[own] + (part, 0, 0) for entries, part, own in slices]),
            )
            start, end = end, end + len(found[1])
            words[:, start:end], places[start:end] = found
        return cls(words[:, :end], places[:end], [part for entries in listed for part in entries.parts])

    def only(self, keys: Iterable[bytes]) -> Entries:
        """Return the entries that have one of these keys."""
        found = sorted({place for key in keys if (place := self._find(key)) is not None})
        return Entries(np.ascontiguousarray(self.words[:, found]), self.places[found], self.parts)

    def serialised(self) -> Serialised:
        """Return the arguments of :meth:`of`, for another process."""
        values = [self.parts[part][start : start + length].numpy() for part, start, length in self.places.tolist()]
        keys = np.frombuffer(self._keys(), np.uint8).reshape(-1, KEY_BYTES)
        return keys, self.places[:, 2], np.concatenate(values) if values else np.zeros(0, np.float32)

    def __getitem__(self, key: bytes) -> Tensor:
        if (place := self._find(key)) is None:
            raise KeyError(key)
        part, start, length = self.places[place].tolist()
        entry: Tensor = self.parts[part][start : start + length]
        return entry

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self._find(key) is not None

    def __iter__(self) -> Iterator[bytes]:
        keys = self._keys()
        return (keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))

    def __len__(self) -> int:
        return int(self.words.shape[1])

    def _keys(self) -> bytes:
        return self.words.T.astype(">u8").tobytes()

    def _find(self, key: bytes) -> int | None:
        high, low = unpack(">QQ", key)
        # Usually only one entry has this first half, of 64 bits.
        first, stop = np.searchsorted(self.words[0], np.uint64(high)), len(self)
        for place in range(int(first), stop):
            if self.words[0, place] != high:
                break
            if self.words[1, place] == low:
                return place
        return None


class GrowingEntries(Container[bytes]):
    """Entries to which others are added many times.

    The entries are in levels, each at least twice as large as the next one. Added entries become the last level, and
    levels are joined until this is so again. Thus n blocks are joined in n log n steps; joining each block with all
    entries before it would take n² steps.

    Args:
        folder: the folder for large indices.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._levels = folder, list[Entries]()

    def add(self, entries: Entries) -> None:
        """Add entries. Of entries with equal keys the last one is kept."""
        self._levels.append(entries)
        while len(self._levels) > 1 and len(self._levels[-2]) < 2 * len(self._levels[-1]):
            self._levels[-2:] = [Entries.joined(self._levels[-2:], self._folder)]

    def joined(self) -> Entries:
        """Return all entries."""
        return self._levels[0] if len(self._levels) == 1 else Entries.joined(self._levels, self._folder)

    def __contains__(self, key: object) -> bool:
        return any(key in level for level in self._levels)


def _words(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys).view(">u8").astype(np.uint64).reshape(-1, 2).T


def _sorted(words: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort by key; of equal keys only the last one is kept."""
    # A stable sort is fast where sorted entries are joined.
    order = np.argsort(words[0], kind="stable")
    first = words[0, order]
    if (first[1:] == first[:-1]).any():
        order = np.lexsort(words[::-1])
        last = np.ones(len(order), bool)
        last[:-1] = np.any(words[:, order[1:]] != words[:, order[:-1]], axis=0)
        order = order[last]
    return np.ascontiguousarray(words[:, order]), places[order]


def _key_ranges(several: Sequence[Entries], count: int) -> Iterator[list[slice]]:
    """Yield the slices of ``several`` for each range of keys. A range has up to about :data:`IN_MEMORY` entries."""
    # Keys are hashes, so ranges of equal size have about equally many entries.
    ranges = max(1, -(-count // IN_MEMORY))
    edges = np.array([(number << 64) // ranges for number in range(1, ranges)], np.uint64)
    cuts = [[0, *np.searchsorted(entries.words[0], edges).tolist(), len(entries)] for entries in several]
    for number in range(ranges):
        yield [slice(own[number], own[number + 1]) for own in cuts]


def _arrays(count: int, folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Return uninitialised ``words`` and ``places`` for ``count`` entries. Large ones are in a file without a name."""
    if folder is not None and count > IN_MEMORY:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                # The space is reserved now, because writing to a mapped file on a full disk would kill the process.
                os.posix_fallocate(file.fileno(), 0, ENTRY_BYTES * count)
                words = np.memmap(file, np.uint64, "r+", shape=(2, count))
                places = np.memmap(file, np.int64, "r+", offset=words.nbytes, shape=(count, 3))
            return np.asarray(words), np.asarray(places)
        except (OSError, AttributeError) as error:  # macOS cannot reserve
            log.warning("reference log-probs: their index is in memory, because %s cannot hold it: %s", folder, error)
    return np.empty((2, count), np.uint64), np.empty((count, 3), np.int64)
