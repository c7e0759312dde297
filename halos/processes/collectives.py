"""Sums, maxima and lists over ranks. Without a process group they are the values of this process.

With tensor parallelism several ranks read the same data. Sums and lists are then taken over a data group, which holds
one rank of each tensor-parallel group (:func:`use_data_group`), so that no example counts twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

if TYPE_CHECKING:
    import lightning.pytorch as pl

Item = TypeVar("Item")

_data_group: dist.ProcessGroup | None = None
"""The process group of the ranks, this one included, that read different data; None: all ranks."""


def use_data_group(group: dist.ProcessGroup | None) -> None:
    """Take sums and lists over this process group from now on; None: over all ranks."""
    global _data_group
    _data_group = group


def data_rank_and_world() -> tuple[int, int]:
    """Return this process's rank in the data group, and the size of the group."""
    if rank_and_world()[1] == 1:
        return 0, 1
    return dist.get_rank(_data_group), dist.get_world_size(_data_group)


def data_ranks(trainer: pl.Trainer) -> tuple[int, int]:
    """Return what :func:`data_rank_and_world` will return; this also works before there is a process group."""
    # Data modules are also used with stand-ins for a Trainer, which have no strategy.
    group_size = getattr(getattr(trainer, "strategy", None), "tensor_parallel_size", 1)
    return trainer.global_rank // group_size, trainer.world_size // group_size


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_rank_zero(make: Callable[[], Item]) -> Item:
    """Call ``make()`` on rank 0 only, and return its result on all ranks."""
    rank, world = rank_and_world()
    values = [make() if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(values)
    return cast("Item", values[0])


def all_sum(values: Tensor) -> Tensor:
    """Return the element-wise sum over the ranks that read different data, without gradient."""
    # Detached, because all_reduce would silently lose the gradient of a tensor that has one.
    total = values.detach().clone()
    if data_rank_and_world()[1] > 1:
        dist.all_reduce(total, group=_data_group)
    return total


def all_gather_list(values: list[Item], *, everywhere: bool = False) -> list[Item]:
    """Return the lists of the ranks that read different data, one after the other.

    Args:
        values: this rank's list.
        everywhere: whether to gather from all ranks, including those that read the same data.
    """
    world = (rank_and_world() if everywhere else data_rank_and_world())[1]
    if world == 1:
        return values
    gathered: list[list[Item]] = [[] for _ in range(world)]
    dist.all_gather_object(gathered, values, group=None if everywhere else _data_group)
    return [value for rank_values in gathered for value in rank_values]


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that is divided over ranks. All ranks call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that is divided over ranks; other tensors are returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors together; they may be divided over ranks in different ways."""
    if len({_mesh(tensor) for tensor in tensors}) < 2:
        return torch.nn.utils.get_total_norm(tensors)
    # PyTorch cannot add tensors of different meshes. So every rank sums the squares of the elements that it holds,
    # divided by the number of ranks that hold the same elements; the sum over all ranks counts every element once.
    squares = [_norm(local(tensor)) ** 2 / _copies(tensor) for tensor in tensors]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    return total.sqrt()


def clip_gradients(parameters: Sequence[Parameter], limit: float, norm: Tensor | None = None) -> None:
    """Scale the gradients so that their norm is at most ``limit``.

    Args:
        parameters: the parameters; those without a gradient are skipped.
        limit: the largest norm.
        norm: the gradients' :func:`total_norm`, if it is known already.
    """
    trained = [p for p in parameters if p.grad is not None]
    norm = total_norm([p.grad for p in trained if p.grad is not None]) if norm is None else norm
    for mesh in {_mesh(p): None for p in trained}:  # PyTorch multiplies tensors of one mesh at a time
        torch.nn.utils.clip_grads_with_norm_([p for p in trained if _mesh(p) == mesh], limit, norm)


def _mesh(tensor: Tensor) -> DeviceMesh | None:
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def _norm(tensor: Tensor) -> Tensor:
    return cast("Tensor", torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)))


def _copies(tensor: Tensor) -> int:
    # The number of ranks that hold each element of the tensor.
    if not isinstance(tensor, DTensor):
        return rank_and_world()[1]
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return rank_and_world()[1] // math.prod(size for placement, size in sizes if not placement.is_replicate())


def all_max(values: list[int]) -> list[int]:
    """Return the element-wise maximum of the ranks' numbers, on all ranks.

    The hosts exchange the numbers without their devices. With NCCL, the host would have to wait until the device has
    finished all earlier work.
    """
    if rank_and_world()[1] == 1:
        return values
    maxima = torch.tensor(values)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=_host_group(dist.group.WORLD))
    return cast("list[int]", maxima.tolist())


@lru_cache(maxsize=1)  # of the newest group of all ranks: a process may leave one and join another
def _host_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a process group of the same ranks that communicates from the memory of hosts; ranks make it together."""
    return world if "gloo" in dist.get_backend(world) else cast("dist.ProcessGroup", dist.new_group(backend="gloo"))
