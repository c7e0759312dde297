"""Which examples make up each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Row indices of one rank's micro-batch, and of the whole step that it belongs to."""

    rows: tuple[int, ...]
    step: tuple[int, ...]


class Bundles:
    """Examples by index, in bundles of at most ``most`` (None: of all) that belong to one group.

    Bundles are numbered by the first example of their group, so examples in groups of their own keep their numbers.
    """

    def __init__(self, groups: Sequence[int] | np.ndarray, most: int | None) -> None:
        _, first, inverse = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
        leader = first[inverse]
        self._members = np.argsort(leader, kind="stable")
        leader = leader[self._members]
        place = np.arange(len(leader)) - np.searchsorted(leader, leader)
        self._starts = np.flatnonzero(place % (most or len(leader)) == 0)
        self._sizes = np.diff(self._starts, append=len(leader))

    def __len__(self) -> int:
        return len(self._starts)

    def laid_out(self, order: Any) -> Any:
        """The examples of the bundles, one bundle behind the other in this order."""
        starts, sizes = self._starts[order], self._sizes[order]
        behind = np.cumsum(sizes) - sizes
        return self._members[np.arange(sizes.sum()) + np.repeat(starts - behind, sizes)]


class TrainingOrder(Sampler[MicroBatch]):
    """The run's micro-batches for one rank: all epochs as one stream, shuffled anew each epoch from (seed, epoch).

    Micro-step m of the run is the m-th stretch of ``world_size * batch_size`` examples of the stream, whichever way it
    is divided over ranks, so one device and many see the same steps. The last step is filled from the next epoch's
    stream: every example is seen, and every step has the same size. With ``groups`` (one number for each example) up
    to ``together`` examples of a group (None: all) are shuffled as one, so that only a batch's edge separates them.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        accumulate: int,
        world_size: int,
        rank: int,
        steps: int,
        seed: int,
        groups: Sequence[int] | np.ndarray | None = None,
        together: int | None = None,
    ) -> None:
        self.size, self.batch_size, self.accumulate = size, batch_size, accumulate
        self.world_size, self.rank, self.steps, self.seed = world_size, rank, steps, seed
        self._bundles = None if groups is None else Bundles(groups, together)
        self.start, self.stop = 0, steps * accumulate

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        wide = self.batch_size * self.world_size
        per_step = wide * self.accumulate
        for number in range(self.start, self.stop):
            step = self._stretch(number // self.accumulate * per_step, per_step)
            offset = number % self.accumulate * wide + self.rank * self.batch_size
            yield MicroBatch(step[offset : offset + self.batch_size], step)

    def _stretch(self, start: int, length: int) -> tuple[int, ...]:
        return tuple(int(self._epoch(i // self.size)[i % self.size]) for i in range(start, start + length))

    def _epoch(self, epoch: int) -> Sequence[int]:
        cached = getattr(self, "_permutations", {})
        if epoch not in cached:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            # Two epochs at most: a stretch spans no more, except over data sets smaller than a step.
            cached = {e: p for e, p in cached.items() if e == epoch - 1}
            count = self.size if self._bundles is None else len(self._bundles)
            shuffled = torch.randperm(count, generator=generator).numpy()
            cached[epoch] = shuffled if self._bundles is None else self._bundles.laid_out(shuffled)
            self._permutations = cached
        return cached[epoch]


def validation_order(size: int, *, batch_size: int, world_size: int, rank: int) -> list[MicroBatch]:
    """Every example exactly once, in the data's order, as equally many micro-batches on every rank.

    Micro-batches have up to twice ``batch_size`` examples, so that no rank is ever left without one.
    """
    if size < world_size:
        raise ValueError(
            f"validation data: expected at least one example for each of {world_size} devices, found {size}"
        )
    count = max(1, size // (batch_size * world_size))
    order = []
    for number in range(count):
        step = tuple(range(size * number // count, size * (number + 1) // count))
        mine = step[len(step) * rank // world_size : len(step) * (rank + 1) // world_size]
        order.append(MicroBatch(mine, step))
    return order
