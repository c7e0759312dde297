"""Training order in which no step lacks a class."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from halos.data.batches.order import TrainingOrder


class StratifiedOrder(TrainingOrder):
    """Both classes in every optimizer step, where the data have both.

    Each class is spread evenly over the epoch, shuffled, so a step's shares are near those of the data. A step that
    would still lack a class, because it is rarer than one in a step, gives its last example up for one of it; these
    are taken in turn, so a rare class is seen more than once an epoch and a few examples of the other one are not.
    The order does not depend on the division over devices and micro-batches. ``labels``: 1 desirable, 0 not, -1
    unknown, which is refused.
    """

    def __init__(self, size: int, *, labels: Sequence[int] | np.ndarray, **options: Any) -> None:
        super().__init__(size, **options)
        self._labels = np.asarray(labels, dtype=np.int8)
        if (self._labels < 0).any():
            raise ValueError("data.stratified: expected a loss that learns from labels; this one's examples have none")
        if self.batch_size * self.world_size * self.accumulate < 2:
            raise ValueError("data.stratified: expected at least two examples in a step, found one")
        self._classes = [found for kind in (True, False) if (found := self._of(kind))]

    def _of(self, kind: bool) -> list[int]:
        return [int(i) for i in np.flatnonzero(self._labels == kind)]

    def _stretch(self, start: int, length: int) -> tuple[int, ...]:
        step = list(super()._stretch(start, length))
        for members in self._classes:
            if not any(self._labels[i] == self._labels[members[0]] for i in step):
                step[-1] = members[start // length % len(members)]
        return tuple(step)

    def _epoch(self, epoch: int) -> list[int]:
        cached = getattr(self, "_spread", {})
        if epoch not in cached:
            cached = {e: order for e, order in cached.items() if e == epoch - 1}
            rng = random.Random((self.seed << 20) + epoch)
            places: list[tuple[float, int]] = []
            for members in self._classes:
                shuffled = rng.sample(members, len(members))
                places += [((n + rng.random()) / len(members), i) for n, i in enumerate(shuffled)]
            cached[epoch] = [i for _, i in sorted(places)]
            self._spread = cached
        return cached[epoch]
