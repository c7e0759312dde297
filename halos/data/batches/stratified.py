"""A training order in which no step lacks a class."""

from __future__ import annotations

import random

import numpy as np

from halos.data.batches.order import Division, Numbers, TrainingOrder


class StratifiedOrder(TrainingOrder):
    """Both classes in every optimizer step, if the data have both.

    Each class is shuffled and spread evenly over the epoch, so the shares in a step are close to those of the data. A
    step that still lacks a class, because the class is rarer than one in a step, gives up its last example for one of
    that class. These are taken in turn, so a rare class is seen more than once an epoch, and a few examples of the
    other class are not seen. The order does not depend on the division over devices and micro-batches.

    Args:
        size: the number of examples.
        division: the part of one rank.
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
        # Data with one class have one list, and no step can lack it.
        members = [np.flatnonzero(self._labels == label).tolist() for label in (1, 0)]
        self._classes: list[list[int]] = [indices for indices in members if indices]

    def _step(self, start: int, length: int) -> tuple[int, ...]:
        step = list(super()._step(start, length))
        for members in self._classes:
            label = self._labels[members[0]]
            if not any(self._labels[i] == label for i in step):
                # A function of the step's number alone, so that a resumed run makes the same choice.
                step[-1] = members[start // length % len(members)]
        return tuple(step)

    def _shuffled(self, epoch: int) -> list[int]:
        rng = random.Random((self.division.seed << 20) + epoch)
        # The n-th example of a class gets a random place in the n-th of equal intervals of [0, 1): sorted by it, both
        # classes are spread evenly, and which example of the other class is next to it stays random.
        places: list[tuple[float, int]] = []
        for members in self._classes:
            shuffled = rng.sample(members, len(members))
            places += [((n + rng.random()) / len(members), i) for n, i in enumerate(shuffled)]
        return [i for _, i in sorted(places)]
