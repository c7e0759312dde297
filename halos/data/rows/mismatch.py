"""Draws another prompt's completion for each example: KTO's y'."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import numpy as np


def in_order(values: np.ndarray) -> np.ndarray:
    """Replace values by numbers from 0 on, in the order in which they first occur; equal values get equal numbers.

    Args:
        values: [n].

    Returns:
        [n] int32.
    """
    # np.unique numbers values by size; rank translates these numbers to the order of first occurrence.
    _, first, member = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int32)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[member]


def derangement(groups: Sequence[int] | np.ndarray, seed: int) -> array[int]:
    """Draw, for each example, the index of an example with another prompt.

    The result is a permutation in which no example gets an example of its own prompt, so every completion is a
    mismatched one exactly once. If one prompt has more than half of the examples, no such permutation exists, and
    partners are drawn independently.

    The permutation is a cyclic shift. The examples are laid out group by group, in random order, and each gets the one
    L places later, where L is the size of the largest group. With the groups A (2 examples), B (3) and C (2), L is 3:

        laid out   B  B  B  A  A  C  C
        partner    A  A  C  C  B  B  B

    The partner is always outside the example's own group, because a group is at most L places long. This also holds
    across the end of the list, where the partner is n - L >= L places earlier.

    Args:
        groups: [n] the group (prompt) of each example.
        seed: the seed of all draws.

    Returns:
        [n] indices of examples.

    Raises:
        ValueError: all examples have the same prompt.
    """
    rng = random.Random(seed)
    numbers = in_order(np.asarray(groups))
    sizes = np.bincount(numbers)
    if len(sizes) < 2:
        raise ValueError(
            "the reference point z₀ compares a prompt with another prompt's completion: expected completions for at "
            "least two different prompts, found one"
        )
    largest = int(sizes.max())
    if 2 * largest > len(numbers):
        return _independent_partners(numbers, int(sizes.argmax()), rng)
    # Arrays of machine integers, because lists of Python integers for millions of examples take gigabytes.
    members = array("q", np.argsort(numbers, kind="stable").tobytes())
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    group_order = array("q", range(len(sizes)))
    rng.shuffle(group_order)
    laid_out = array("q")
    for group in group_order:
        group_members = members[starts[group] : starts[group + 1]]
        rng.shuffle(group_members)
        laid_out.extend(group_members)
    examples = np.frombuffer(laid_out, dtype=np.int64)
    partner = np.empty_like(examples)
    partner[examples] = np.roll(examples, -largest)
    return array("q", partner.tobytes())


def _independent_partners(groups: np.ndarray, majority: int, rng: random.Random) -> array[int]:
    # The majority draws from a list of the other examples: for it, drawing until the prompt differs would take long.
    outside = np.flatnonzero(groups != majority).tolist()

    def draw(group: int) -> int:
        if group == majority:
            return int(rng.choice(outside))
        # More than half of all examples qualify, so this ends after two draws on average.
        while groups[index := rng.randrange(len(groups))] == group:
            pass
        return index

    return array("q", map(draw, groups.tolist()))
