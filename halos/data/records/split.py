"""Holding out validation records."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from halos.checks import check_whole
from halos.data.records.record import Record, prompt_key
from halos.data.records.table import RecordTable, table_of


def split_by_prompt(records: Sequence[Record], val_size: int, seed: int) -> tuple[RecordTable, RecordTable]:
    """Hold out all records of some prompts, so that no prompt is on both sides.

    Which prompts they are depends on the seed and on the prompts, not on the order of the records.

    Args:
        records: the records.
        val_size: prompts are held out until they have at least this many records.
        seed: seed of the draw.

    Returns:
        Training and validation records, both in their order.

    Raises:
        ValueError: if nothing would remain to train on.
    """
    check_whole("data.val_size", val_size, 0)
    table = table_of(records)
    prompts, first, member, sizes = np.unique(
        table.numbers("prompt"), return_index=True, return_inverse=True, return_counts=True
    )
    # Shuffled from the order of their texts, not from np.unique's: the split does not depend on how digests are made.
    shuffled = array("q", _by_text(table, first).tobytes())
    random.Random(seed).shuffle(shuffled)
    order = np.frombuffer(shuffled, dtype=np.int64)
    records_before = np.cumsum(sizes[order]) - sizes[order]
    held_out = np.zeros(len(prompts), dtype=bool)
    held_out[order[records_before < val_size]] = True
    if held_out.all():
        raise ValueError(
            f"data.val_size: expected records to remain to train on; found {val_size} of {len(table)} records "
            f"with {len(prompts)} different prompts"
        )
    return table.take(np.flatnonzero(~held_out[member])), table.take(np.flatnonzero(held_out[member]))


def _by_text(records: RecordTable, first: np.ndarray) -> np.ndarray:
    """Return the indices of prompts in the order of their texts.

    Args:
        records: the records.
        first: [prompts] the index of a record of each prompt.
    """
    at = np.argsort(first)
    # Blocks of texts in Arrow's memory, which sorts them without a Python object for each.
    blocks = np.split(first[at], range(records.BLOCK, len(at), records.BLOCK))
    keys = [pa.array([prompt_key(record.prompt) for record in records.many(block)], "large_string") for block in blocks]
    return np.asarray(at[pc.sort_indices(pa.chunked_array(keys)).to_numpy()], dtype=np.int64)
