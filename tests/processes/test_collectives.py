"""Sums over ranks: seen from a single process, and in groups that read the same data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from halos.processes.collectives import (
    all_gather_list,
    all_sum,
    clip_gradients,
    data_rank_and_world,
    data_ranks,
    full_tensor,
    rank_and_world,
    total_norm,
    use_data_group,
)
from tests.fork import run_ranks


@pytest.fixture(params=["without a process group", "in a group of one"])
def alone(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    if request.param == "without a process group":
        yield
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_the_sum_of_one_rank_is_its_own() -> None:
    values = torch.tensor([1.5, -2.0])
    assert torch.equal(all_sum(values), values)


@pytest.mark.usefixtures("alone")
def test_the_sum_is_a_copy_without_gradient() -> None:
    values = torch.ones(2, requires_grad=True)
    total = all_sum(values)
    assert not total.requires_grad
    total += 1
    assert values.tolist() == [1.0, 1.0]


@pytest.mark.usefixtures("alone")
def test_the_list_of_one_rank_is_its_own() -> None:
    assert all_gather_list(["a", 1]) == ["a", 1]
    assert all_gather_list([]) == []


# Four ranks, of which 0 and 1, and 2 and 3, read the same data


def in_groups_of_two() -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    use_data_group(mesh["data"].get_group())
    found = {
        "sum": all_sum(torch.tensor(2.0**rank)).item(),
        "list": all_gather_list([rank]),
        "everywhere": all_gather_list([rank], everywhere=True),
        "data": data_rank_and_world(),
        "all": rank_and_world(),
    }
    use_data_group(None)
    return found | {"whole sum": all_sum(torch.tensor(2.0**rank)).item()}


@pytest.mark.ranks
def test_sums_and_lists_are_over_the_ranks_that_read_different_data() -> None:
    for rank, found in enumerate(run_ranks(in_groups_of_two, 4)):
        group, place = divmod(rank, 2)
        assert found == {
            "sum": 2.0**place + 2.0 ** (place + 2),
            "list": [place, place + 2],
            "everywhere": [0, 1, 2, 3],
            "data": (group, 2),
            "all": (rank, 4),
            "whole sum": 15.0,
        }


def norms_of_differently_divided_tensors() -> list[float]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    flat = init_device_mesh("cpu", (4,))
    wholes = [torch.arange(1.0, 36.0).view(7, 5) * n for n in range(1, 6)]
    ways = [
        (mesh, [Shard(0), Shard(1)]),
        (mesh, [Shard(0), Replicate()]),
        (mesh["data"], [Shard(0)]),
        (flat, [Shard(0)]),
    ]
    divided = [distribute_tensor(tensor, *way) for tensor, way in zip(wholes, ways, strict=False)]  # type: ignore[arg-type]
    parameters = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in divided]
    for parameter, gradient in zip(parameters, divided, strict=True):
        parameter.grad = gradient
    norms = [total_norm(divided), total_norm([*divided, wholes[4]]), total_norm(divided[:2])]
    clip_gradients(parameters, 3.0)
    clipped = [full_tensor(parameter.grad) for parameter in parameters]
    torch.testing.assert_close(clipped[2] * 4, clipped[3] * 3)
    return [*(full_tensor(norm).item() for norm in norms), torch.cat(clipped).norm().item()]


@pytest.mark.ranks
def test_each_element_counts_once_in_a_norm_however_it_is_divided() -> None:
    squares = sum(n * n for n in range(1, 36))
    expected = [(squares * (1 + 4 + 9 + 16 + more)) ** 0.5 for more in (0, 25)]
    for found in run_ranks(norms_of_differently_divided_tensors, 4):
        assert found == pytest.approx([*expected, (squares * 5) ** 0.5, 3.0], rel=1e-5)


def test_a_trainer_says_which_ranks_read_different_data_before_there_is_a_group() -> None:
    plain = SimpleNamespace(global_rank=3, world_size=6)
    assert data_ranks(plain) == (3, 6)  # type: ignore[arg-type]
    divided = SimpleNamespace(global_rank=3, world_size=6, strategy=SimpleNamespace(tensor_parallel_size=2))
    assert data_ranks(divided) == (1, 3)  # type: ignore[arg-type]
