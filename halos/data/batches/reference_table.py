"""The reference's log-probs of completions that were computed before training."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import torch
from torch import Tensor

from halos.data.batches.reference_entries import KEY_BYTES
from halos.data.rows.token_rows import Row, Span


def entry_key(prompt: Sequence[int], completion: Sequence[int], context: Sequence[Span] = ()) -> bytes:
    """The key of a completion after its prompt; it depends on their token ids, and on which of them are scored."""
    # The prompt's length stands first: without it, moving tokens from one to the other would not change the key.
    ids = array("q", (len(prompt), *prompt, *completion))
    for start, stop in context:
        ids.extend((-1, start, stop))  # no id is negative
    return hashlib.blake2b(ids.tobytes(), digest_size=KEY_BYTES).digest()


def keys_of(rows: Iterable[Row]) -> Iterator[bytes]:
    """Yield the key of each completion of the rows."""
    return (key for key, _ in _keyed(rows))


def _keyed(rows: Iterable[Row]) -> Iterator[tuple[bytes, Row]]:
    # The key of each completion, and a row with its prompt and this completion only.
    for row in rows:
        for branch, context in zip(row.branches, row.context or repeat(()), strict=False):
            one = Row("", 0, row.prompt, (branch,), context=(context,) if context else ())
            yield entry_key(row.prompt, branch, context), one


def completions(rows: Iterable[Row], known: Container[bytes] = ()) -> dict[bytes, Row]:
    """Return, by its key, each completion once, as a row with its prompt and this completion only.

    Completions of one prompt follow each other, so that they share it in a pack, and short prompts come first.

    Args:
        rows: the rows.
        known: keys of completions to leave out.
    """
    by_key: dict[bytes, Row] = {}
    for key, one in _keyed(rows):
        if key not in known:
            by_key.setdefault(key, one)
    return dict(sorted(by_key.items(), key=lambda item: (len(item[1].prompt), item[1].prompt, item[1].branches)))


@dataclass(slots=True)
class ReferenceTable:
    """log π_ref(y_t | x, y_<t) in float32 for every scored token of completions y after prompts x.

    Attributes:
        entries: for each :func:`entry_key` the log-probs [scored tokens of the completion].
        computed: the number of entries that were not in a cache.
    """

    entries: Mapping[bytes, Tensor] = field(default_factory=dict)
    computed: int = 0

    def logprobs(self, rows: Sequence[Row], width: int) -> Tensor:
        """The log-probs of the rows' branches.

        Args:
            rows: B rows with up to K branches each.
            width: at least the largest number of scored tokens in a branch.

        Returns:
            [B, K, width] log-probs, zero after the end of a branch and where a row has none.

        Raises:
            ValueError: names the row of a completion that the table does not have.
        """
        grid = torch.zeros(len(rows), max(len(row.branches) for row in rows), width, dtype=torch.float32)
        for b, row in enumerate(rows):
            for k, branch in enumerate(row.branches):
                entry = self.entries.get(entry_key(row.prompt, branch, row.context[k] if row.context else ()))
                # A length can differ only if two keys collide: better an error than log-probs of another completion.
                if entry is None or len(entry) != len(row.scored(k)):
                    raise ValueError(f"{row.id}: expected the reference's log-probs of completion {k}, found none")
                grid[b, k, : len(entry)] = entry
        return grid
