"""Threads as ranks: collectives give what a process group's do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from halos.testing.ranks import on_ranks


def reduced(value: float, op: Any) -> float:
    tensor = torch.tensor([value])
    dist.all_reduce(tensor, op)
    return float(tensor)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (dist.ReduceOp.SUM, 6.0),
        (dist.ReduceOp.AVG, 2.0),
        (dist.ReduceOp.MAX, 3.0),
        (dist.ReduceOp.MIN, 1.0),
    ],
)
def test_reductions(op: Any, expected: float) -> None:
    assert on_ranks([partial(reduced, value, op) for value in (1.0, 2.0, 3.0)]) == [expected] * 3


def gathered(value: float) -> tuple[int, int, list[float], list[str]]:
    parts = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.tensor([value]))
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, f"rank {dist.get_rank()}")
    return dist.get_rank(), dist.get_world_size(), [float(part) for part in parts], names


def test_gathering_keeps_the_order_of_ranks() -> None:
    names = ["rank 0", "rank 1"]
    assert on_ranks([partial(gathered, 5.0), partial(gathered, 7.0)]) == [
        (0, 2, [5.0, 7.0], names),
        (1, 2, [5.0, 7.0], names),
    ]


def test_without_ranks_there_is_no_process_group_again() -> None:
    on_ranks([lambda: None])
    assert not dist.is_initialized()


def fail() -> float:
    raise KeyError("mine")


def test_the_error_of_the_rank_that_failed_is_raised() -> None:
    functions: list[Callable[[], float]] = [partial(reduced, 1.0, dist.ReduceOp.SUM), fail]
    with pytest.raises(KeyError, match="mine"):
        on_ranks(functions)


def test_a_rank_that_does_not_come_is_no_deadlock() -> None:
    functions: list[Callable[[], float]] = [partial(reduced, 1.0, dist.ReduceOp.SUM), lambda: 0.0]
    with pytest.raises(threading.BrokenBarrierError):
        on_ranks(functions, timeout=0.2)
