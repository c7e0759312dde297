"""``model.head_chunk``: how many rows of logits, one for each scored token, are in memory at a time.

Each chunk reads the head's weight three times and adds to the weight's gradient, whatever its number of rows. On a GPU
these bytes take more time than the products unless a chunk has a few thousand rows. So on CUDA ``auto`` chooses a
number of rows whose logits take a small part of the free memory (docs/results/launches.md has the bytes). On other
devices the number is fixed.
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
"""Limits of ``auto`` on CUDA. With more rows a GPU's time goes into the products, and bytes no longer matter."""
PART_OF_FREE_MEMORY = 32
"""A chunk's logits take up to the free memory divided by this number. Gradients, the optimizer's state and
activations need the rest; they do not exist when it is read, before the first step."""


def check_head_chunk(rows: object) -> None:
    """Raise ``ValueError`` unless the setting is a whole number from 1 on, ``auto`` or None (all rows)."""
    if rows not in (AUTO, None) and (type(rows) is not int or rows < 1):
        raise ValueError(f"model.head_chunk: expected a whole number from 1 on, {AUTO} or null, found {rows!r}")


def chunk_rows(setting: int | str | None, states: Tensor, vocabulary: int) -> int | None:
    """Return the number of rows of a chunk; None: all rows.

    Args:
        setting: ``model.head_chunk``.
        states: the states that the head reads. Logits are computed on their device and in their precision.
        vocabulary: the number of columns of the logits.
    """
    if not isinstance(setting, str):
        return setting
    # A GPU's work may be traced on the meta device, which has no memory; an estimate sets a number of rows instead.
    if device_type(states) != "cuda" or not states.is_cuda:
        return FIXED_ROWS
    return rows_that_fit(free_memory(states.device), vocabulary, product_dtype(states).itemsize)


def rows_that_fit(free: float, vocabulary: int, itemsize: int) -> int:
    """Return the number of rows that ``auto`` takes on a GPU: a power of two.

    Args:
        free: bytes of the GPU's free memory.
        vocabulary: the number of logits in a row.
        itemsize: bytes of a logit.
    """
    rows = int(free / PART_OF_FREE_MEMORY / (vocabulary * itemsize))
    # Free memory differs a little from one start to the next, which seldom changes a power of two.
    return min(max(1 << max(rows, 1).bit_length() - 1, FEWEST_ROWS), MOST_ROWS)


@cache  # read once, so that later forward passes have the same chunks, whatever else is in memory
def free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that were free when this function was first called for it."""
    free, _ = torch.cuda.mem_get_info(device)
    # PyTorch keeps memory that tensors have freed, which the driver counts as used.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
