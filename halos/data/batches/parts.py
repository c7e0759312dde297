"""``data.max_tokens_per_batch``: the parts of a micro-batch that are packed one by one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from halos.data.batches.prefix_tree import PrefixTree
from halos.data.rows.token_rows import Row


def divide(rows: Sequence[Row], max_tokens: int | None, *, share_prompts: bool = True) -> list[slice]:
    """Divide rows into consecutive parts that have up to ``max_tokens`` tokens each when they are packed.

    The tokens of all branches are counted. A row with more tokens is a part of its own. With ``max_tokens=None`` there
    is one part.
    """
    if max_tokens is None:
        return [slice(0, len(rows))]
    edges, tree = [0], PrefixTree(share=share_prompts)
    for number, row in enumerate(rows):
        before = tree.tokens
        for branch in row.branches:
            tree.add(row.prompt, branch)
        if before and tree.tokens > max_tokens:
            edges.append(number)
            # The new part needs its own copy of what this row shared with the part before.
            tree = PrefixTree(share=share_prompts)
            for branch in row.branches:
                tree.add(row.prompt, branch)
    return [slice(start, end) for start, end in pairwise([*edges, len(rows)])]
