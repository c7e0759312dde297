"""What ranks tell each other; the identity without a process group.

With tensor parallelism several ranks read the same data. Sums and lists are over the ranks that read different data,
once :func:`use_data_group` has said which these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

Made = TypeVar("Made")

_data_group: Any = None
"""The process group of this rank and the others that read different data; None: all ranks."""


def use_data_group(group: Any) -> None:
    """Sums and lists are over this process group from now on; None: over all ranks."""
    global _data_group
    _data_group = group


def data_rank_and_world() -> tuple[int, int]:
    """This process's rank among those that read different data, and the number of those."""
    if rank_and_world()[1] == 1:
        return 0, 1
    return dist.get_rank(_data_group), dist.get_world_size(_data_group)


def data_ranks(trainer: Any) -> tuple[int, int]:
    """The same before there is a process group, from a Lightning Trainer."""
    share = getattr(getattr(trainer, "strategy", None), "tensor_parallel_size", 1)
    return trainer.global_rank // share, trainer.world_size // share


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
    """The element-wise sum over the ranks that read different data, without gradient.

    ``dist.all_reduce`` on a tensor that carries gradient would be silently wrong.
    """
    total = values.detach().clone()
    if data_rank_and_world()[1] > 1:
        dist.all_reduce(total, group=_data_group)
    return total


def all_gather_list(values: list[Any], *, everywhere: bool = False) -> list[Any]:
    """The lists of the ranks that read different data, one after the other; ``everywhere``: of all ranks."""
    world = (rank_and_world() if everywhere else data_rank_and_world())[1]
    if world == 1:
        return values
    gathered: list[list[Any]] = [[] for _ in range(world)]
    dist.all_gather_object(gathered, values, group=None if everywhere else _data_group)
    return [value for part in gathered for value in part]


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that is divided over ranks; all of them have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is divided over ranks, or the whole of one that is not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together; they may be divided over ranks in different ways."""
    if len({_mesh(tensor) for tensor in tensors}) < 2:
        return torch.nn.utils.get_total_norm(tensors)
    # Elements that several ranks hold count once.
    squares = [_norm(local(tensor)) ** 2 / _copies(tensor) for tensor in tensors]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    return total.sqrt()


def clip_gradients(parameters: Sequence[Parameter], limit: float, norm: Tensor | None = None) -> None:
    """Scale the gradients so that their :func:`total_norm`, or the ``norm`` given, is at most ``limit``."""
    trained = [p for p in parameters if p.grad is not None]
    norm = total_norm([p.grad for p in trained if p.grad is not None]) if norm is None else norm
    for mesh in {_mesh(p): None for p in trained}:  # PyTorch multiplies tensors of one mesh at a time
        torch.nn.utils.clip_grads_with_norm_([p for p in trained if _mesh(p) == mesh], limit, norm)


def _mesh(tensor: Tensor) -> DeviceMesh | None:
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _copies(tensor: Tensor) -> int:
    # On how many of all ranks each element is.
    if not isinstance(tensor, DTensor):
        return rank_and_world()[1]
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return rank_and_world()[1] // math.prod(size for placement, size in sizes if not placement.is_replicate())


def all_max(values: list[int], device: torch.device) -> list[int]:
    """The element-wise maximum over ranks."""
    if rank_and_world()[1] == 1:
        return values
    most = torch.tensor(values, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    found: list[int] = most.tolist()
    return found
