"""The loader of a stream."""

from __future__ import annotations

from typing import Any

from halos.data.batches.collate import Batch
from halos.data.batches.loader import Resumable
from halos.data.streaming.batches import StreamBatches
from halos.data.streaming.examples import Counted


class StreamLoader(Resumable):
    """Of rows that are read as they are needed; ``counted`` is what was counted up to the last batch."""

    def __init__(self, batches: StreamBatches, **options: Any) -> None:
        super().__init__(batches, batches, **options)
        self.counted = Counted()

    def batch_of(self, served: tuple[Batch | ValueError, Counted]) -> Batch:
        """The batch. Raises ``ValueError`` for bad data."""
        batch, self.counted = served
        if isinstance(batch, ValueError):
            raise batch
        return batch
