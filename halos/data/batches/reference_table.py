"""The reference's log-probs of completions, where they were computed before training."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halos.data.rows.token_rows import Row

KEY_BYTES = 16


def entry_key(prompt: Sequence[int], completion: Sequence[int]) -> bytes:
    """The key of a completion behind its prompt: of their token ids, and nothing else."""
    ids = array("q", (len(prompt), *prompt, *completion))
    return hashlib.blake2b(ids.tobytes(), digest_size=KEY_BYTES).digest()


def completions(rows: Iterable[Row]) -> dict[bytes, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and completion of every branch, each once, those of one prompt together and short prompts first."""
    found = {entry_key(row.prompt, branch): (row.prompt, branch) for row in rows for branch in row.branches}
    return dict(sorted(found.items(), key=lambda item: (len(item[1][0]), item[1])))


@dataclass(slots=True)
class ReferenceTable:
    """log π_ref(y_t | x, y_<t) in float32 for every token of completions y behind prompts x.

    ``computed``: how many of the entries were not found in a cache.
    """

    entries: dict[bytes, Tensor] = field(default_factory=dict)
    computed: int = 0

    def logprobs(self, rows: Sequence[Row], width: int) -> Tensor:
        """Those of the rows' branches, [B, K, width], zero behind their ends.

        Raises ``ValueError`` naming the row for a completion that the table does not have.
        """
        grid = torch.zeros(len(rows), len(rows[0].branches), width, dtype=torch.float32)
        for b, row in enumerate(rows):
            for k, branch in enumerate(row.branches):
                found = self.entries.get(entry_key(row.prompt, branch))
                if found is None or len(found) != len(branch):
                    raise ValueError(f"{row.id}: expected the reference's log-probs of completion {k}, found none")
                grid[b, k, : len(branch)] = found
        return grid
