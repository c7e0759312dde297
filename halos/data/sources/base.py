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
from halos.data.records.record import Record
from halos.data.records.truth import TrueReward
from halos.data.sources.adapted import Origin, check_faultless
from halos.data.store.arrow import MEMORY, Store


@dataclass(frozen=True, slots=True)
class Records:
    """The records of one split.

    Attributes:
        records: the records, in their order.
        dropped: counts of what was left out, by reason.
        origins: the same for each file, where the records come from files.
    """

    records: Sequence[Record]
    dropped: Counter[str]
    origins: dict[str, Origin] = field(default_factory=dict)


class Source(ABC):
    """Training records and, where there are any, validation records.

    Attributes:
        name: the name in ``data=NAME`` and in errors.
        store: where sources that read files keep their records.
        reading: limits of the files that are read.
        whole_trees: whether each assistant turn of a conversation is a completion of a record of its own.
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
        """Return the validation records, None where the source has none of its own."""

    def names_of(self, part: str) -> np.ndarray:
        """Return digests of the ids of one part's records that were read so far, where a source has named parts.

        Raises ``ValueError`` if there is no such part.
        """
        raise ValueError(f"loss.data: expected data=mix, whose sources have names, found {part} with data={self.name}")

    def check_first_rows(self) -> None:  # noqa: B027 (most sources have nothing to check)
        """Raise ``ValueError`` for files that cannot be read, or whose first rows are malformed."""

    def check_stream(self) -> None:  # noqa: B027 (most sources have nothing to check)
        """Raise ``ValueError`` if :meth:`stream` has to read the whole data set first."""

    def stream(self, origins: dict[str, Origin], *, strict: bool = False) -> Iterator[Record]:
        """Yield the training records one after the other.

        This implementation is for sources whose records are in memory anyway.

        Args:
            origins: updated with the counts of each file while it is read.
            strict: raise ``ValueError`` for records that would be left out because they are faulty.
        """
        records = self.train()
        if strict:
            check_faultless(records.origins)
        count, places = len(records.records), {reason: [self.name] for reason in records.dropped}
        origins.update(records.origins or {self.name: Origin(count, count, records.dropped, places)})
        yield from records.records

    def stream_key(self) -> str:
        """Return a key of what :meth:`stream` yields, without reading large files."""
        hasher = hashlib.sha256()
        for record in self.train().records:
            hasher.update(repr(record).encode("utf-8", "surrogatepass"))
        return hasher.hexdigest()

    def true_reward(self) -> TrueReward | None:
        """Return the true reward, None where it is not known."""
        return None
