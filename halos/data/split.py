"""Holding out validation records."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from halos.data.feedback import Feedback
from halos.data.records import RecordTable, table_of


def split_by_prompt(records: Sequence[Feedback], val_size: int, seed: int) -> tuple[RecordTable, RecordTable]:
    """(train, val): whole prompts are held out until ``val_size`` records are, so that no prompt is on both sides.

    Which prompts these are depends on the seed and the prompts, not on the order of the records.
    """
    if val_size < 0:
        raise ValueError(f"expected val_size to be 0 or more; found {val_size}")
    table = table_of(records)
    prompts, member, sizes = np.unique(table.numbers("prompt"), return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(prompts))
    before = np.cumsum(sizes[order]) - sizes[order]
    held = np.zeros(len(prompts), dtype=bool)
    held[order[before < val_size]] = True
    if held.all():
        raise ValueError(
            f"expected val_size to leave records to train on; found {val_size} of {len(table)} records "
            f"with {len(prompts)} different prompts"
        )
    return table.take(np.flatnonzero(~held[member])), table.take(np.flatnonzero(held[member]))
