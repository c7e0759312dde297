"""The reference's log-probs of completions that were computed before training."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from struct import unpack
from typing import Self

import numpy as np
import torch
from torch import Tensor

from halos.data.rows.token_rows import Row, Span

KEY_BYTES = 16


def entry_key(prompt: Sequence[int], completion: Sequence[int], context: Sequence[Span] = ()) -> bytes:
    """The key of a completion after its prompt; it depends on their token ids, and on which of them are scored."""
    # The prompt's length stands first: without it, moving tokens from one to the other would not change the key.
    ids = array("q", (len(prompt), *prompt, *completion))
    for start, stop in context:
        ids.extend((-1, start, stop))  # no id is negative
    return hashlib.blake2b(ids.tobytes(), digest_size=KEY_BYTES).digest()


def keys_of(rows: Iterable[Row]) -> Iterator[bytes]:
    """Yield the key of each completion of the rows."""
    return (key for key, _ in _keyed(rows))


def _keyed(rows: Iterable[Row]) -> Iterator[tuple[bytes, Row]]:
    # The key of each completion, and a row with its prompt and this completion only.
    for row in rows:
        for branch, context in zip(row.branches, row.context or repeat(()), strict=False):
            one = Row("", 0, row.prompt, (branch,), context=(context,) if context else ())
            yield entry_key(row.prompt, branch, context), one


def completions(rows: Iterable[Row], known: Container[bytes] = ()) -> dict[bytes, Row]:
    """Return, by its key, each completion once, as a row with its prompt and this completion only.

    Completions of one prompt follow each other, so that they share it in a pack, and short prompts come first.

    Args:
        rows: the rows.
        known: keys of completions to leave out.
    """
    by_key: dict[bytes, Row] = {}
    for key, one in _keyed(rows):
        if key not in known:
            by_key.setdefault(key, one)
    return dict(sorted(by_key.items(), key=lambda item: (len(item[1].prompt), item[1].prompt, item[1].branches)))


Packed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Keys [n, 16] uint8, the number of values of each [n] int64, and all values one after the other, float32."""


class Entries(Mapping[bytes, Tensor]):
    """Log-probs by key. An entry takes 40 bytes besides its values; in a dict of tensors it would take 500.

    Attributes:
        words: [2, n] uint64 the first and the second halves of the keys, sorted.
        places: [n, 3] int64 of each entry: its part, where it starts there, and its length.
        parts: flat float32 tensors of log-probs, which may be memory-mapped.
    """

    def __init__(self, words: np.ndarray, places: np.ndarray, parts: Sequence[Tensor]) -> None:
        # A stable sort, so that of equal keys the last one can be taken.
        order = np.lexsort(words[::-1])
        last = np.ones(len(order), bool)
        last[:-1] = np.any(words[:, order[1:]] != words[:, order[:-1]], axis=0)
        order = order[last]
        # Contiguous, as a search would copy each half otherwise.
        self.words, self.places, self.parts = np.ascontiguousarray(words[:, order]), places[order], tuple(parts)

    @classmethod
    def of(cls, keys: np.ndarray, lengths: np.ndarray, values: Tensor | np.ndarray) -> Self:
        """Make entries of keys [n, 16] uint8, the number of values of each, and all values one after the other."""
        places = np.stack([np.zeros_like(lengths), np.cumsum(lengths) - lengths, lengths], axis=1)
        return cls(_words(keys), places, [torch.as_tensor(values)])

    @classmethod
    def joined(cls, several: Iterable[Entries]) -> Self:
        """Join entries. Of those with equal keys the last one counts."""
        words, places = [np.zeros((2, 0), np.uint64)], [np.zeros((0, 3), np.int64)]
        parts: list[Tensor] = []
        for entries in several:
            words.append(entries.words)
            places.append(entries.places + np.array([len(parts), 0, 0]))
            parts += entries.parts
        return cls(np.concatenate(words, axis=1), np.concatenate(places), parts)

    def only(self, keys: Iterable[bytes]) -> Entries:
        """Return the entries that have one of these keys."""
        found = sorted({place for key in keys if (place := self._find(key)) is not None})
        return Entries(self.words[:, found], self.places[found], self.parts)

    def packed(self) -> Packed:
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
        # One entry as a rule: half of a key is 64 bits.
        first, stop = np.searchsorted(self.words[0], np.uint64(high)), len(self)
        for place in range(int(first), stop):
            if self.words[0, place] != high:
                break
            if self.words[1, place] == low:
                return place
        return None


def _words(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys).view(">u8").astype(np.uint64).reshape(-1, 2).T


@dataclass(slots=True)
class ReferenceTable:
    """log π_ref(y_t | x, y_<t) in float32 for every scored token of completions y after prompts x.

    Attributes:
        entries: for each :func:`entry_key` the log-probs [scored tokens of the completion].
        computed: the number of entries that were not in a cache.
    """

    entries: Mapping[bytes, Tensor] = field(default_factory=dict)
    computed: int = 0

    def logprobs(self, rows: Sequence[Row], width: int) -> Tensor:
        """The log-probs of the rows' branches.

        Args:
            rows: B rows with up to K branches each.
            width: at least the largest number of scored tokens in a branch.

        Returns:
            [B, K, width] log-probs, zero after the end of a branch and where a row has none.

        Raises:
            ValueError: names the row of a completion that the table does not have.
        """
        grid = torch.zeros(len(rows), max(len(row.branches) for row in rows), width, dtype=torch.float32)
        for b, row in enumerate(rows):
            for k, branch in enumerate(row.branches):
                entry = self.entries.get(entry_key(row.prompt, branch, row.context[k] if row.context else ()))
                # A length can differ only if two keys collide: better an error than log-probs of another completion.
                if entry is None or len(entry) != len(row.scored(k)):
                    raise ValueError(f"{row.id}: expected the reference's log-probs of completion {k}, found none")
                grid[b, k, : len(entry)] = entry
        return grid
