"""A loader that a resumed run takes up where it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from halos.data.batches import Batch, Batches
from halos.data.order import TrainingOrder


class ResumableLoader(DataLoader[Batch]):
    """A loader that counts the micro-batches it has served, so that a resumed run goes on with the next one."""

    def __init__(self, batches: Batches, order: TrainingOrder, **options: Any) -> None:
        super().__init__(batches, sampler=order, batch_size=None, **options)
        self._order = order
        self._served = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._order.start = self._served
        for batch in super().__iter__():
            self._served += 1
            yield batch

    def __len__(self) -> int:
        return len(self._order)

    def state_dict(self) -> dict[str, int]:
        """Lightning keeps this in the checkpoint."""
        return {"served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the micro-batches that were served before the checkpoint."""
        self._served = state["served"]
