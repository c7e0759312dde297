"""Sums over ranks that are the identity without a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

Made = TypeVar("Made")


def on_first_process() -> bool:
    """Whether this process writes and prints; known before there is a process group."""
    return getattr(rank_zero_only, "rank", 0) == 0


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_rank_zero(make: Callable[[], Made]) -> Made:
    """What ``make()`` returns on rank 0; it is called nowhere else."""
    rank, world = rank_and_world()
    values: list[Any] = [make() if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(values)
    made: Made = values[0]
    return made


def all_sum(values: Tensor) -> Tensor:
    """The element-wise sum over ranks, without gradient.

    ``dist.all_reduce`` on a tensor that carries gradient would be silently wrong.
    """
    total = values.detach().clone()
    if rank_and_world()[1] > 1:
        dist.all_reduce(total)
    return total


def all_gather_list(values: list[Any]) -> list[Any]:
    """The lists of all ranks, one after the other."""
    world = rank_and_world()[1]
    if world == 1:
        return values
    gathered: list[list[Any]] = [[] for _ in range(world)]
    dist.all_gather_object(gathered, values)
    return [value for part in gathered for value in part]


def all_max(values: list[int], device: torch.device) -> list[int]:
    """The element-wise maximum over ranks."""
    if rank_and_world()[1] == 1:
        return values
    most = torch.tensor(values, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    found: list[int] = most.tolist()
    return found
