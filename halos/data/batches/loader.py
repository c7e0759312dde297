"""Data loaders that continue where a stopped run was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset

from halos.data.batches.collate import Batches
from halos.data.batches.order import TrainingOrder


class Startable(Protocol):
    """The micro-batches of a run; iterating begins with number ``start``."""

    start: int

    def __len__(self) -> int: ...


class Resumable(DataLoader[Any]):
    """Counts the micro-batches that it has served, so that a resumed run continues with the next one.

    Args:
        order: the micro-batches of the run; its ``start`` is set here.
        dataset: the batches themselves.
        sampler: for a dataset that is read by index, the indices (micro-batches).
        options: ``num_workers`` and ``pin_memory`` of ``DataLoader``.
    """

    def __init__(
        self, order: Startable, dataset: Dataset[Any], sampler: TrainingOrder | None = None, **options: Any
    ) -> None:
        super().__init__(dataset, batch_size=None, sampler=sampler, **options)  # None: the dataset serves whole batches
        self._order = order
        self._served = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Set here, not on resume: Lightning iterates anew in each epoch, which goes on after the one before.
        self._order.start = self._served
        for item in super().__iter__():
            # Counted when it is handed out, not when a worker makes it: workers are batches ahead.
            self._served += 1
            yield item

    def __len__(self) -> int:
        return len(self._order)

    def state_dict(self) -> dict[str, int]:
        """The state that Lightning saves in the checkpoint."""
        return {"served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the micro-batches that were served before the checkpoint."""
        self._served = state["served"]


class ResumableLoader(Resumable):
    """The loader of prepared rows.

    Args:
        batches: the batches by their micro-batch.
        order: the micro-batches of the run.
        epoch: micro-batches in a Lightning epoch; None: the whole run is one Lightning epoch.
        options: see :class:`Resumable`.
    """

    def __init__(self, batches: Batches, order: TrainingOrder, *, epoch: int | None = None, **options: Any) -> None:
        super().__init__(order, batches, order, **options)
        self._training_order, self._epoch = order, epoch or max(1, len(order))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Also after a resume within an epoch: the iteration ends where that epoch does.
        end = (self._served // self._epoch + 1) * self._epoch
        self._training_order.stop = min(end, len(self._training_order))
        return super().__iter__()

    def __len__(self) -> int:
        return min(self._epoch, len(self._training_order))
