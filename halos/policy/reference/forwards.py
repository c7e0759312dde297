"""The forwards of the reference pass: which completions are computed together."""

from __future__ import annotations

from collections.abc import Iterator

from halos.data.batches.parts import divide
from halos.data.batches.prefix_tree import PrefixTree
from halos.data.rows.token_rows import Row

FULL = 0.5
"""The share of a forward's tokens from which on it may end, so that the next one repeats less."""

Work = list[tuple[bytes, Row]]
"""The completions of one forward: the cache key of each, and a row with its prompt and this completion alone."""


def forwards(items: Work, max_tokens: int, *, share_prompts: bool) -> Iterator[Work]:
    """Divide completions, in order, into forwards of up to ``max_tokens`` tokens; a longer one has its own forward.

    Args:
        items: completions in an order in which those that begin alike follow each other.
        max_tokens: tokens in a forward, counted without those that its completions share.
        share_prompts: whether common beginnings are computed once. A forward then ends, once it is at least half full,
            where the next one repeats the fewest tokens: not between completions of one prompt, if possible.
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
    """The place after the last completion of the forward that begins with ``items[start]``."""
    tree, end, least_shared = PrefixTree(), len(items), max_tokens
    for place in range(start, len(items)):
        _, row = items[place]
        before = tree.tokens
        tree.add(row.prompt, row.branches[0])
        is_over = place > start and tree.tokens > max_tokens
        if place > start and (is_over or before >= FULL * max_tokens):
            # What this completion shares with those before it is computed again if a forward begins with it.
            shared = len(row.prompt) + len(row.branches[0]) - (tree.tokens - before)
            if shared <= least_shared or end == len(items):
                end, least_shared = place, shared
        if is_over:
            return end
    return len(items)
