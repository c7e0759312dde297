"""Divides the completions of the reference pass into forward passes."""

from __future__ import annotations

from collections.abc import Iterator

from halos.data.batches.parts import divide
from halos.data.batches.prefix_tree import PrefixTree
from halos.data.rows.token_rows import Row

FULL = 0.5
"""A forward pass may end once it has this share of its maximum of tokens, if the next one then repeats fewer tokens."""

Work = list[tuple[bytes, Row]]
"""The completions of one forward pass: the cache key of each, and a row with its prompt and only this completion."""


def forwards(items: Work, max_tokens: int, *, share_prompts: bool) -> Iterator[Work]:
    """Divide completions, in order, into forward passes of up to ``max_tokens`` tokens. A longer completion is alone.

    Args:
        items: completions, sorted so that those with the same beginning follow each other.
        max_tokens: the maximum number of tokens in a forward pass. A beginning that completions share is counted once.
        share_prompts: whether common beginnings are computed once. A forward pass that is at least half full then ends
            where the next one repeats the fewest tokens: if possible, not between completions of one prompt.
    """
    if not share_prompts:
        for part in divide([row for _, row in items], max_tokens, share_prompts=False):
            yield items[part]
        return
    start = 0
    while start < len(items):
        stop = _end(items, start, max_tokens)
        yield items[start:stop]
        start = stop


def _end(items: Work, start: int, max_tokens: int) -> int:
    """The index after the last completion of the forward pass that begins with ``items[start]``."""
    tree, end, least_shared = PrefixTree(), len(items), max_tokens
    for place in range(start, len(items)):
        _, row = items[place]
        before = tree.tokens
        tree.add(row.prompt, row.branches[0])
        is_over = place > start and tree.tokens > max_tokens
        if place > start and (is_over or before >= FULL * max_tokens):
            # If a forward pass begins with this completion, what it shares with earlier ones is computed again.
            shared = len(row.prompt) + len(row.branches[0]) - (tree.tokens - before)
            if shared <= least_shared or end == len(items):
                end, least_shared = place, shared
        if is_over:
            return end
    return len(items)
