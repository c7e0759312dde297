"""``model.head_chunk``: how many rows of logits, one for each scored token, are in memory at a time.

Each chunk reads the head's weight three times and adds to the weight's gradient, whatever its number of rows. On a GPU
these bytes cost more than the products unless a chunk has a few thousand rows, so ``auto`` takes as many there as a
small part of the free memory holds (docs/results/launches.md has the bytes). On other devices it takes a fixed number.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from halos.policy.kernels.device_types import device_type
from halos.policy.logprobs.precision import product_dtype

AUTO = "auto"
FIXED_ROWS = 512
"""Rows of a chunk with ``auto``, except on CUDA."""
FEWEST_ROWS, MOST_ROWS = 128, 4096
"""With more rows the products, and not the bytes, take the time of a GPU."""
PART_OF_FREE_MEMORY = 32
"""A chunk's logits may take one part in this many of the memory that is free before the first step. Gradients, the
optimizer's state and activations do not exist then, and need the rest."""


def check_head_chunk(rows: object) -> None:
    """Raise ``ValueError`` unless the setting is a whole number from 1 on, ``auto`` or None (all rows)."""
    if rows not in (AUTO, None) and (type(rows) is not int or rows < 1):
        raise ValueError(f"model.head_chunk: expected a whole number from 1 on, {AUTO} or null, found {rows!r}")


def chunk_rows(setting: int | str | None, states: Tensor, vocabulary: int) -> int | None:
    """Return the number of rows of a chunk; None: all.

    Args:
        setting: ``model.head_chunk``.
        states: the states that the head reads, which say on what device and in what precision logits are computed.
        vocabulary: columns of the logits.
    """
    if not isinstance(setting, str):
        return setting
    # The meta device, where a GPU's work is traced, has no memory to ask for; the estimate sets a number instead.
    if device_type(states) != "cuda" or not states.is_cuda:
        return FIXED_ROWS
    return rows_that_fit(free_memory(states.device), vocabulary, product_dtype(states).itemsize)


def rows_that_fit(free: float, vocabulary: int, itemsize: int) -> int:
    """Return how many rows ``auto`` takes on a GPU: a power of two.

    Args:
        free: bytes of the GPU's memory that are free.
        vocabulary: numbers in a row.
        itemsize: bytes of each.
    """
    rows = int(free / PART_OF_FREE_MEMORY / (vocabulary * itemsize))
    # A power of two, so that a few bytes more or less, as from one start to the next, seldom make another number.
    return min(max(1 << max(rows, 1).bit_length() - 1, FEWEST_ROWS), MOST_ROWS)


@cache  # read once: later forwards have the same chunks, whatever else is in memory then
def free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that were free when this function was first called for it."""
    free, _ = torch.cuda.mem_get_info(device)
    # PyTorch keeps memory that tensors have freed, which the driver counts as used.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
