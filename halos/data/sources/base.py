"""Sources of feedback. A ``data/*.yaml`` names a source, and the signature of its constructor is the YAML's schema."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from halos.data.reading.lines import USUAL, ReadingLimits
from halos.data.records.adapted import FileCounts, check_faultless
from halos.data.records.record import Record
from halos.data.records.truth import TrueReward
from halos.data.store.arrow import MEMORY, Store


@dataclass(frozen=True, slots=True)
class Records:
    """The records of one split.

    Attributes:
        records: the records, in their order.
        dropped: counts of what was left out, by reason.
        origins: for each file that the records come from, its own counts; empty if they do not come from files.
    """

    records: Sequence[Record]
    dropped: Counter[str]
    origins: dict[str, FileCounts] = field(default_factory=dict)


class Source(ABC):
    """Yields training records and, if there are any, validation records.

    Attributes:
        name: the name in ``data=NAME`` and in errors.
        store: where sources that read files keep their records.
        reading: limits for the files that are read.
        whole_trees: whether every assistant turn of a conversation is already a completion of some record.
    """

    name: ClassVar[str]
    store: Store = MEMORY
    reading: ReadingLimits = USUAL
    whole_trees: bool = False

    @abstractmethod
    def train(self) -> Records:
        """Return the training records."""

    @abstractmethod
    def val(self) -> Records | None:
        """Return the validation records; None if the source has no validation data of its own."""

    def names_of(self, part: str) -> np.ndarray:
        """Return digests of the ids of the records read so far from one named part (``data=mix`` has named parts).

        Raises ``ValueError`` if there is no such part.
        """
        raise ValueError(f"loss.data: expected data=mix, whose sources have names, found {part} with data={self.name}")

    def check_first_rows(self) -> None:  # noqa: B027 (most sources have nothing to check)
        """Raise ``ValueError`` for files that cannot be read, or whose first rows are malformed."""

    def check_stream(self) -> None:  # noqa: B027 (most sources have nothing to check)
        """Raise ``ValueError`` if :meth:`stream` has to read the whole data set first."""

    def stream(self, origins: dict[str, FileCounts], *, strict: bool = False) -> Iterator[Record]:
        """Yield the training records one after the other.

        This default implementation reads all records first, for sources whose records are in memory anyway.

        Args:
            origins: updated with the counts of each file while it is read.
            strict: raise ``ValueError`` for faulty records instead of leaving them out.
        """
        records = self.train()
        if strict:
            check_faultless(records.origins)
        count, places = len(records.records), {reason: [self.name] for reason in records.dropped}
        origins.update(records.origins or {self.name: FileCounts(count, count, records.dropped, places)})
        yield from records.records

    def stream_key(self) -> str:
        """Return a key of what :meth:`stream` yields, without reading large files."""
        hasher = hashlib.sha256()
        for record in self.train().records:
            hasher.update(repr(record).encode("utf-8", "surrogatepass"))
        return hasher.hexdigest()

    def true_reward(self) -> TrueReward | None:
        """Return the true reward; None if it is not known."""
        return None
