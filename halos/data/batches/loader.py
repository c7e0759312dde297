"""Loaders that a resumed run takes up where it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from halos.data.batches.collate import Batch, Batches
from halos.data.batches.order import TrainingOrder


class Resumable(DataLoader[Batch]):
    """Counts the micro-batches that it has served, so that a resumed run goes on with the next one.

    Args:
        order: yields the micro-batches from ``start`` up to ``stop``, both set here.
        dataset: what the micro-batches are taken from.
        epoch: micro-batches of a Lightning epoch; None: the run is one Lightning epoch.
        options: those of ``DataLoader``.
    """

    def __init__(self, order: Any, dataset: Any, *, epoch: int | None = None, **options: Any) -> None:
        super().__init__(dataset, batch_size=None, **options)
        self._order, self._epoch = order, epoch
        self._served = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._order.start = self._served
        if self._epoch is not None:
            self._order.stop = min((self._served // self._epoch + 1) * self._epoch, len(self._order))
        for served in super().__iter__():
            self._served += 1
            yield self.batch_of(served)

    def batch_of(self, served: Any) -> Batch:
        """The batch in what the data set serves."""
        batch: Batch = served
        return batch

    def __len__(self) -> int:
        return len(self._order) if self._epoch is None else min(self._epoch, len(self._order))

    def state_dict(self) -> dict[str, int]:
        """Lightning keeps this in the checkpoint."""
        return {"served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the micro-batches that were served before the checkpoint."""
        self._served = state["served"]


class ResumableLoader(Resumable):
    """The loader of prepared rows."""

    def __init__(self, batches: Batches, order: TrainingOrder, *, epoch: int | None = None, **options: Any) -> None:
        super().__init__(order, batches, epoch=epoch, sampler=order, **options)
