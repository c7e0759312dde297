"""The data loader of a stream."""

from __future__ import annotations

from typing import Unpack, cast

from halos.data.batches.collate import Batch
from halos.data.batches.loader import LoaderOptions, Resumable
from halos.data.streaming.batches import Served, StreamBatches
from halos.data.streaming.examples import Counted


class StreamLoader(Resumable):
    """Serves the micro-batches of a stream.

    Args:
        batches: the micro-batches.
        options: see :class:`LoaderOptions`. At most one worker makes sense, as each one would read the whole stream.

    Attributes:
        counted: what was read and used up to the last batch that was served.
    """

    def __init__(self, batches: StreamBatches, **options: Unpack[LoaderOptions]) -> None:
        super().__init__(batches, batches, **options)
        self.counted = Counted()

    def batch_of(self, served: object) -> Batch:
        """Return the batch of an item of the stream. Raises ``ValueError`` for bad data that a worker found."""
        batch, self.counted = cast(Served, served)
        if isinstance(batch, ValueError):
            raise batch
        return batch
