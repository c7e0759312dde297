"""The order of examples: which of them make up each step of training and validation."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Sampler

Numbers = Sequence[int] | np.ndarray


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One rank's micro-batch.

    Attributes:
        rows: indices of its rows.
        step: indices of the rows of the whole optimizer step, on all ranks.
    """

    rows: tuple[int, ...]
    step: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """How a run is divided into micro-batches, as seen by one rank.

    Attributes:
        batch_size: examples in a micro-batch of one rank.
        accumulate: micro-batches in an optimizer step.
        world_size: ranks with data of their own.
        rank: the number of this rank.
        steps: optimizer steps of the run.
        seed: the seed of the shuffles.
    """

    batch_size: int
    accumulate: int = 1
    world_size: int = 1
    rank: int = 0
    steps: int = 0
    seed: int = 0

    @property
    def per_step(self) -> int:
        """Examples in an optimizer step, on all ranks."""
        return self.batch_size * self.world_size * self.accumulate

    def rank_slice(self, number: int) -> slice:
        """The places of this rank's examples in their step, for micro-batch ``number`` of the step."""
        start = (number * self.world_size + self.rank) * self.batch_size
        return slice(start, start + self.batch_size)


class Bundles:
    """Example indices, grouped into bundles of up to ``max_size`` examples of the same group.

    With ``max_size=2``, the groups 5 7 5 5 7 give the bundles (0, 2), (3) and (1, 4). Bundles are in the order of the
    first example of their group, so if every example has a group of its own, bundle n is example n.

    Args:
        groups: [n] the group of each example.
        max_size: examples in a bundle; None: the whole group.
    """

    def __init__(self, groups: Numbers, max_size: int | None) -> None:
        _, first, inverse = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
        # For groups 5 7 5 5 7: leader = 0 1 0 0 1, for each example the first one of its group. Sorted by leader, the
        # members are 0 2 3 | 1 4, and their places in the group 0 1 2 | 0 1. Every max_size-th place starts a bundle.
        leader = first[inverse]
        self._members = np.argsort(leader, kind="stable")
        leader = leader[self._members]
        place = np.arange(len(leader)) - np.searchsorted(leader, leader)
        self._starts = np.flatnonzero(place % (max_size or len(leader)) == 0)
        self._sizes = np.diff(self._starts, append=len(leader))

    def __len__(self) -> int:
        return len(self._starts)

    def laid_out(self, order: Numbers) -> np.ndarray:
        """The examples of the bundles, one bundle after the other in this order.

        Args:
            order: numbers of bundles.
        """
        starts, sizes = self._starts[order], self._sizes[order]
        # Vectorised, as there may be millions of bundles. Within a bundle, places in the result and places among the
        # members both count up by one, so the two differ by a constant offset for each bundle.
        ends = np.cumsum(sizes)
        offsets = starts - (ends - sizes)
        examples: np.ndarray = self._members[np.arange(sizes.sum()) + np.repeat(offsets, sizes)]
        return examples


class TrainingOrder(Sampler[MicroBatch]):
    """The run's micro-batches for one rank. All passes form one stream, and (seed, pass) shuffles each pass.

    A step is the next ``per_step`` examples of the stream, however they are divided over ranks and micro-batches, so
    one device and many see the same steps. The last step of a pass is filled from the next pass: every example is
    seen, and every step has the same size.

    Args:
        size: the number of examples.
        division: how the run is divided, for one rank.
        groups: [size] the group (prompt) of each example; None shuffles every example separately.
        together: with ``groups``, up to this many examples of a group are shuffled as one bundle. They follow each
            other, so only the end of a micro-batch can separate them. None: the whole group.
    """

    def __init__(
        self, size: int, division: Division, *, groups: Numbers | None = None, together: int | None = None
    ) -> None:
        self.size, self.division = size, division
        self._bundles = None if groups is None else Bundles(groups, together)
        # A step reads from at most two passes, unless the data set is smaller than a step.
        self._pass = lru_cache(maxsize=2)(self._shuffled)
        self.start, self.stop = 0, len(self)

    def __len__(self) -> int:
        return self.division.steps * self.division.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        per_step = self.division.per_step
        for number in range(self.start, self.stop):
            # A micro-batch depends only on its number, so a resumed run can start at any of them.
            step_number, micro_step = divmod(number, self.division.accumulate)
            step = self._step(step_number * per_step, per_step)
            yield MicroBatch(step[self.division.rank_slice(micro_step)], step)

    def _step(self, start: int, length: int) -> tuple[int, ...]:
        """The examples ``start`` to ``start + length`` of the stream of all passes."""
        return tuple(int(self._pass(i // self.size)[i % self.size]) for i in range(start, start + length))

    def _shuffled(self, pass_number: int) -> Numbers:
        # The shift keeps (seed, pass) pairs apart for the first million passes.
        generator = torch.Generator().manual_seed((self.division.seed << 20) + pass_number)
        if self._bundles is None:
            return torch.randperm(self.size, generator=generator).numpy()
        return self._bundles.laid_out(torch.randperm(len(self._bundles), generator=generator).numpy())


class StratifiedOrder(TrainingOrder):
    """An order with both classes in every optimizer step, if the data have both.

    Each class is shuffled and spread evenly over the pass, so the shares in a step are close to those of the data. If
    a step still lacks a class, which has less than one example for each step, its last example is replaced by one of
    this class. The replacements are taken in turn, so a rare class is seen more than once in a pass, and a few examples
    of the other class are not seen. The order does not depend on the division over devices and micro-batches.

    Args:
        size: the number of examples.
        division: how the run is divided, for one rank.
        labels: [size] 1 desirable, 0 undesirable, -1 unknown.

    Raises:
        ValueError: a label is unknown, or a step has one example only.
    """

    def __init__(self, size: int, division: Division, *, labels: Numbers) -> None:
        super().__init__(size, division)
        self._labels = np.asarray(labels, dtype=np.int8)
        if (self._labels < 0).any():
            raise ValueError(
                "data.stratified: expected a loss that learns from labels, found examples without labels; set "
                "data.stratified=false"
            )
        if division.per_step < 2:
            raise ValueError("data.stratified: expected at least two examples in a step, found one")
        # If the data have only one class, there is one list, and no step can lack a class.
        members = [np.flatnonzero(self._labels == label).tolist() for label in (1, 0)]
        self._classes: list[list[int]] = [indices for indices in members if indices]

    def _step(self, start: int, length: int) -> tuple[int, ...]:
        step = list(super()._step(start, length))
        for members in self._classes:
            label = self._labels[members[0]]
            if not any(self._labels[i] == label for i in step):
                # The choice depends only on the number of the step, so that a resumed run makes the same one.
                step[-1] = members[start // length % len(members)]
        return tuple(step)

    def _shuffled(self, pass_number: int) -> list[int]:
        rng = random.Random((self.division.seed << 20) + pass_number)
        # [0, 1) is divided into equal intervals, one for each example of a class, and the n-th example gets a random
        # place in the n-th interval. Sorted by these places, both classes are spread evenly, in random relative order.
        places: list[tuple[float, int]] = []
        for members in self._classes:
            shuffled = rng.sample(members, len(members))
            places += [((n + rng.random()) / len(members), i) for n, i in enumerate(shuffled)]
        return [i for _, i in sorted(places)]


def validation_order(size: int, division: Division) -> list[MicroBatch]:
    """The micro-batches of one rank for validation. All ranks together read every example once, in the data's order.

    Every rank has the same number of micro-batches, of up to twice its batch size each: the remainder is spread over
    them, so that no rank is left without an example.

    Raises:
        ValueError: there are fewer examples than ranks.
    """
    rank, world_size = division.rank, division.world_size
    if size < world_size:
        raise ValueError(f"validation data: expected one example for each of {world_size} devices, found {size}")
    count = max(1, size // (division.batch_size * world_size))
    # The edges n * size // count divide the data, and each step, without gaps into parts that differ by at most one.
    order = []
    for number in range(count):
        step = tuple(range(size * number // count, size * (number + 1) // count))
        rank_rows = step[len(step) * rank // world_size : len(step) * (rank + 1) // world_size]
        order.append(MicroBatch(rank_rows, step))
    return order
