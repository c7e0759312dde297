"""Holding out validation records."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from halos.data.records.record import Record, prompt_key
from halos.data.records.table import RecordTable, table_of

TEXT = pa.large_string()


def split_by_prompt(records: Sequence[Record], val_size: int, seed: int) -> tuple[RecordTable, RecordTable]:
    """(train, val): whole prompts are held out until ``val_size`` records are, so that no prompt is on both sides.

    Which prompts these are depends on the seed and the prompts, not on the order of the records.
    """
    if val_size < 0:
        raise ValueError(f"expected val_size to be 0 or more; found {val_size}")
    table = table_of(records)
    prompts, first, member, sizes = np.unique(
        table.numbers("prompt"), return_index=True, return_inverse=True, return_counts=True
    )
    in_order_of_texts = array("q", _by_text(table, first).tobytes())
    random.Random(seed).shuffle(in_order_of_texts)
    order = np.frombuffer(in_order_of_texts, dtype=np.int64)
    before = np.cumsum(sizes[order]) - sizes[order]
    held = np.zeros(len(prompts), dtype=bool)
    held[order[before < val_size]] = True
    if held.all():
        raise ValueError(
            f"expected val_size to leave records to train on; found {val_size} of {len(table)} records "
            f"with {len(prompts)} different prompts"
        )
    return table.take(np.flatnonzero(~held[member])), table.take(np.flatnonzero(held[member]))


def _by_text(records: RecordTable, first: np.ndarray) -> np.ndarray:
    """Numbers of prompts in the order of their texts; ``first`` [n] are records that have them."""
    at = np.argsort(first)
    blocks = np.split(first[at], range(records.BLOCK, len(at), records.BLOCK))
    keys = [pa.array([prompt_key(record.prompt) for record in records.many(block)], TEXT) for block in blocks]
    return np.asarray(at[pc.sort_indices(pa.chunked_array(keys)).to_numpy()], dtype=np.int64)
