"""Data loaders that continue where a stopped run was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypedDict, Unpack, cast

from torch.utils.data import DataLoader, Dataset

from halos.data.batches.collate import Batch, Batches
from halos.data.batches.order import TrainingOrder


class Startable(Protocol):
    """The micro-batches of a run; iterating begins with number ``start``."""

    start: int

    def __len__(self) -> int: ...


class LoaderOptions(TypedDict, total=False):
    """Options of ``DataLoader``: processes that load batches, and whether batches are copied to pinned memory."""

    num_workers: int
    pin_memory: bool


class Resumable(DataLoader[object]):
    """Counts the micro-batches that it has served, so that a resumed run continues with the next one.

    Args:
        order: the micro-batches of the run; its ``start`` is set here.
        dataset: the batches themselves.
        sampler: for a dataset that is read by index, the indices (micro-batches).
        options: see :class:`LoaderOptions`.
    """

    def __init__(
        self,
        order: Startable,
        dataset: Dataset[object],
        sampler: TrainingOrder | None = None,
        **options: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(dataset, batch_size=None, sampler=sampler, **options)  # None: the dataset serves whole batches
        self._order = order
        self._served = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # Set here, not on resume: Lightning iterates anew in each epoch, which goes on after the one before.
        self._order.start = self._served
        for served in super().__iter__():
            # Counted when it is handed out, not when a worker makes it: workers are batches ahead.
            self._served += 1
            yield self.batch_of(served)

    def batch_of(self, served: object) -> Batch:
        """The batch in an item of the dataset."""
        return cast(Batch, served)

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
        options: see :class:`LoaderOptions`.
    """

    def __init__(
        self, batches: Batches, order: TrainingOrder, *, epoch: int | None = None, **options: Unpack[LoaderOptions]
    ) -> None:
        super().__init__(order, batches, order, **options)
        self._training_order, self._epoch = order, epoch

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self._epoch is not None:
            # Also after a resume within an epoch: the iteration ends where that epoch does.
            end = (self._served // self._epoch + 1) * self._epoch
            self._training_order.stop = min(end, super().__len__())
        return super().__iter__()

    def __len__(self) -> int:
        return super().__len__() if self._epoch is None else min(self._epoch, super().__len__())
