"""A table of Arrow record batches, and sequences whose items are made of its rows when they are read."""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from operator import eq
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa

T_co = TypeVar("T_co", covariant=True)

Notes = dict[str, Any]
"""What a part of a table records about itself (counts, digests), as plain JSON."""


class Table:
    """Record batches of one schema; a row is found by its number without reading others.

    Attributes:
        batches: the record batches that have rows.
        notes: the notes of the table's parts, in their order.
        key: the key under which it is stored; None in memory.
        starts: [batches + 1] the number of each batch's first row, then the number of rows.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], notes: Sequence[Notes] = (), key: str | None = None) -> None:
        self.batches = [batch for batch in batches if batch.num_rows]
        self.notes, self.key = list(notes), key
        self.starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])
        self._starts: list[int] = self.starts.tolist()  # Python finds a number among a few faster than NumPy
        self._numbers: dict[str, np.ndarray] = {}
        self._cached_lists: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def numbers(self, name: str) -> np.ndarray:
        """Return a column of numbers, [len]: a copy, which is cached."""
        if name not in self._numbers:
            self._numbers[name] = _joined(batch.column(name).to_numpy() for batch in self.batches)
        return self._numbers[name]

    def sizes(self, name: str) -> np.ndarray:
        """Return the sizes of the lists in a column, [len]."""
        return _joined(np.diff(self._lists(n, name)[0]) for n in range(len(self.batches)))

    def text_at(self, row: int, name: str) -> str:
        """Return the text of one row."""
        batch, place = self._place(row)
        text: str = self.batches[batch].column(name)[place].as_py()
        return text

    def list_at(self, row: int, name: str) -> np.ndarray:
        """Return the numbers in the list of one row; not copied."""
        batch, place = self._place(row)
        offsets, values = self._lists(batch, name)
        numbers: np.ndarray = values[offsets[place] : offsets[place + 1]]
        return numbers

    def _place(self, row: int) -> tuple[int, int]:
        """Return the batch of a row, and its place in that batch."""
        batch = bisect_right(self._starts, row) - 1
        return batch, row - self._starts[batch]

    def _lists(self, batch: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (offsets, values) of a column of lists of numbers in one batch; not copied."""
        # Cached, as Arrow makes new Python objects for every access to a column, which takes longer than the reading.
        if (batch, name) not in self._cached_lists:
            column = self.batches[batch].column(name)
            self._cached_lists[batch, name] = (column.offsets.to_numpy(), column.values.to_numpy())
        return self._cached_lists[batch, name]

    def select(self, rows: np.ndarray) -> Iterator[pa.RecordBatch]:
        """Yield the rows with these numbers, which ascend, as record batches."""
        if not len(rows):
            return
        # Group the rows by their batch: as they ascend, the rows of one batch follow each other.
        owners = np.searchsorted(self.starts, rows, side="right") - 1
        numbers, edges = np.unique(owners, return_index=True)
        for n, of_batch in zip(numbers.tolist(), np.split(rows, edges[1:]), strict=True):
            batch, places = self.batches[n], of_batch - self.starts[n]
            # A slice shares the batch's memory; take() copies. Neighbouring rows are by far the most frequent case.
            if places[-1] - places[0] + 1 == len(places):
                yield batch.slice(int(places[0]), len(places))
            else:
                yield batch.take(pa.array(places))


def _joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(arrays) or [np.zeros(0, np.int64)])


class Stored(Sequence[T_co]):
    """A sequence whose items are made from stored data each time they are requested; it compares like a list."""

    BLOCK = 512
    """Items that iteration makes at a time."""

    @abstractmethod
    def many(self, indices: np.ndarray) -> list[T_co]:
        """Return the items with these indices, which count from 0 and come in any order."""

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> list[T_co]: ...
    def __getitem__(self, index: int | slice) -> T_co | list[T_co]:
        # Indexing a range resolves negative indices and raises IndexError.
        if isinstance(index, slice):
            return self.many(np.array(range(len(self))[index], dtype=np.int64))
        return self.many(np.array([range(len(self))[index]]))[0]

    def __iter__(self) -> Iterator[T_co]:
        # In blocks: single items would look up their batch each time, all at once would hold every item in memory.
        for start in range(0, len(self), self.BLOCK):
            yield from self.many(np.arange(start, min(start + self.BLOCK, len(self))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {len(self)}: {self[:3]}{'…' if len(self) > 3 else ''}"
