"""Sums over ranks, seen from a single process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from halos.distributed import all_gather_list, all_sum


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
