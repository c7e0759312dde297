"""The data loader of a stream."""

from __future__ import annotations

from typing import cast

from halos.data.batches.collate import Batch
from halos.data.batches.loader import Resumable
from halos.data.streaming.batches import Served, StreamBatches
from halos.data.streaming.examples import Counted


class StreamLoader(Resumable):
    """Serves the micro-batches of a stream.

    Args:
        batches: the micro-batches.
        num_workers: 0 or 1; every further worker would read the same stream.
        pin_memory: copy batches to pinned memory.

    Attributes:
        counted: what was read and used up to the last batch that was served.
    """

    def __init__(self, batches: StreamBatches, *, num_workers: int = 0, pin_memory: bool = False) -> None:
        super().__init__(batches, batches, num_workers=num_workers, pin_memory=pin_memory)
        self.counted = Counted()

    def batch_of(self, served: object) -> Batch:
        """The batch in an item of the stream. Raises ``ValueError`` for bad data that a worker found."""
        batch, self.counted = cast(Served, served)
        if isinstance(batch, ValueError):
            raise batch
        return batch
