"""The data loader of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from halos.data.batches.collate import Batch
from halos.data.batches.loader import Resumable
from halos.data.streaming.batches import StreamBatches
from halos.data.streaming.examples import Counted


class StreamLoader(Resumable):
    """Serves the micro-batches of a stream.

    Args:
        batches: the micro-batches.
        options: see :class:`.Resumable`. At most one worker makes sense, as each one would read the whole stream.

    Attributes:
        counted: what was read and used up to the last batch that was served.
    """

    def __init__(self, batches: StreamBatches, **options: Any) -> None:
        super().__init__(batches, batches, **options)
        self.counted = Counted()

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches. Raises ``ValueError`` for bad data that a worker found."""
        for batch, self.counted in super().__iter__():
            if isinstance(batch, ValueError):
                raise batch
            yield batch
