"""Sums over ranks that are the identity without a process group."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def all_sum(values: Tensor) -> Tensor:
    """The element-wise sum over ranks, without gradient.

    ``dist.all_reduce`` on a tensor that carries gradient would be silently wrong.
    """
    total = values.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


def all_gather_list(values: list[Any]) -> list[Any]:
    """The lists of all ranks, one after the other."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    gathered: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, values)
    return [value for part in gathered for value in part]
