"""Simulates several ranks in one process: each is a thread, and collectives exchange values between threads."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def on_ranks(functions: Sequence[Callable[[], T]], *, timeout: float = 30.0) -> list[T]:
    """Run each function as one rank of a process group, in threads of this process.

    Within a function, ``all_reduce`` (sum, mean, minimum, maximum), ``all_gather`` and ``all_gather_object`` of
    ``torch.distributed`` work on the default group.

    Args:
        functions: one for each rank.
        timeout: seconds that a collective waits for the other ranks.

    Returns:
        The functions' results, by rank.

    Raises:
        BaseException: the error of the first rank that failed.
    """
    world = _World(len(functions), timeout)
    with mock.patch.multiple(dist, **world.functions()), ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(world.run, rank, function) for rank, function in enumerate(functions)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    # The error of the rank that failed comes first: the ranks that waited for it only report a broken barrier.
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


class _World:
    def __init__(self, size: int, timeout: float) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.slots: list[object] = [None] * size
        self.local = threading.local()

    def run(self, rank: int, function: Callable[[], T]) -> T:
        self.local.rank = rank
        try:
            return function()
        except BaseException:
            self.barrier.abort()
            raise

    def functions(self) -> dict[str, Any]:
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "get_world_size": lambda group=None: self.size,
            "get_rank": lambda group=None: self.local.rank,
            "all_reduce": self.all_reduce,
            "all_gather": self.all_gather,
            "all_gather_object": self.all_gather_object,
        }

    def exchange(self, value: T) -> list[T]:
        self.slots[self.local.rank] = value
        self.barrier.wait()
        values = cast("list[T]", list(self.slots))
        # Nobody may write a slot again before all ranks have read it.
        self.barrier.wait()
        return values

    def all_reduce(self, tensor: Tensor, op: object = dist.ReduceOp.SUM, group: object = None) -> None:
        ops = dist.ReduceOp
        reductions: dict[object, Callable[..., Tensor]]
        reductions = {ops.SUM: torch.sum, ops.AVG: torch.mean, ops.MAX: torch.amax, ops.MIN: torch.amin}
        parts = self.exchange(tensor.detach().clone())
        with torch.no_grad():
            tensor.copy_(reductions[op](torch.stack(parts), dim=0))

    def all_gather(self, target: list[Tensor], tensor: Tensor, group: object = None) -> None:
        for place, part in zip(target, self.exchange(tensor.detach().clone()), strict=True):
            place.copy_(part)

    def all_gather_object(self, target: list[object], value: object, group: object = None) -> None:
        target[:] = self.exchange(value)
