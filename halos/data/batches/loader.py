"""A data loader that continues where a stopped run ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset, IterableDataset


class MicroBatches(Protocol):
    """The micro-batches of a run; iterating yields those with the numbers from ``start`` to ``stop``."""

    start: int
    stop: int

    def __iter__(self) -> Iterator[object]: ...
    def __len__(self) -> int: ...


class ResumableLoader(DataLoader[Any]):
    """Counts the micro-batches that it has served, so that a resumed run continues with the next one.

    Args:
        dataset: the batches.
        order: the micro-batches of the run; a stream is its own order. The loader sets ``start`` and ``stop``.
        epoch: micro-batches in a Lightning epoch; None: the whole run is one Lightning epoch.
        options: ``num_workers`` and ``pin_memory`` of ``DataLoader``.
    """

    def __init__(self, dataset: Dataset[Any], order: MicroBatches, *, epoch: int | None = None, **options: Any) -> None:
        sampler = None if isinstance(dataset, IterableDataset) else order
        super().__init__(dataset, batch_size=None, sampler=sampler, **options)  # None: the dataset yields whole batches
        self._order, self._epoch = order, epoch or max(1, len(order))
        self._served = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Set here, not on resume, because Lightning starts a new iteration in each epoch, which continues after the
        # previous one. After a resume within an epoch, the iteration ends at the end of that epoch.
        end = (self._served // self._epoch + 1) * self._epoch
        self._order.start, self._order.stop = self._served, min(end, len(self._order))
        for item in super().__iter__():
            # Counted when it is yielded, not when a worker makes it: workers are several batches ahead.
            self._served += 1
            yield item

    def __len__(self) -> int:
        return min(self._epoch, len(self._order))

    def state_dict(self) -> dict[str, int]:
        """The state that Lightning saves in the checkpoint."""
        return {"served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the micro-batches that were served before the checkpoint."""
        self._served = state["served"]
