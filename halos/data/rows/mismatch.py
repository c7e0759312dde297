"""For each example another prompt's completion: KTO's y'."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import numpy as np


def in_order(values: np.ndarray) -> np.ndarray:
    """Numbers for values, [n]: equal ones for equal values, from 0 on in the order in which they first come."""
    _, first, member = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int32)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[member]


def derangement(groups: Sequence[int] | np.ndarray, seed: int) -> array[int]:
    """For each example the index of one with another prompt, drawn from the seed.

    A permutation without a fixed prompt wherever one exists: with the examples laid out group by group in random
    order, a cyclic shift by the size of the largest group leaves no example inside its own group. If one prompt owns
    more than half of the examples no such permutation exists, and partners are drawn independently.

    Raises ``ValueError`` if all examples share one prompt.
    """
    rng = random.Random(seed)
    numbers = in_order(np.asarray(groups))
    sizes = np.bincount(numbers)
    if len(sizes) < 2:
        raise ValueError(
            "the KL reference point compares a prompt with another prompt's completion: expected completions for at "
            "least two different prompts, found one"
        )
    largest = int(sizes.max())
    if 2 * largest > len(numbers):
        return _independent_partners(numbers, int(sizes.argmax()), rng)
    members = array("q", np.argsort(numbers, kind="stable").tobytes())
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    blocks = array("q", range(len(sizes)))
    rng.shuffle(blocks)
    order = array("q")
    for block in blocks:
        mine = members[starts[block] : starts[block + 1]]
        rng.shuffle(mine)
        order.extend(mine)
    laid = np.frombuffer(order, dtype=np.int64)
    partner = np.empty_like(laid)
    partner[laid] = np.roll(laid, -largest)
    return array("q", partner.tobytes())


def _independent_partners(groups: np.ndarray, majority: int, rng: random.Random) -> array[int]:
    outside = np.flatnonzero(groups != majority).tolist()

    def draw(group: int) -> int:
        if group == majority:
            return int(rng.choice(outside))
        # More than half of all examples qualify, so this ends after two draws on average.
        while groups[index := rng.randrange(len(groups))] == group:
            pass
        return index

    return array("q", map(draw, groups.tolist()))
