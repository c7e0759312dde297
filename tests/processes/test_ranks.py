"""A rank that is gone is named."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from halos.processes import ranks
from halos.processes.errors import RunFailed

HOST = socket.gethostname()
CLOSED = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3133"


def gone() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def fail(message: str, others: list[tuple[str, int]]) -> None:
    with ranks.lost_ranks_named():
        ranks._addresses.extend([(HOST, os.getpid()), *others])
        raise RuntimeError(message)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([(HOST, gone())], r"rank 1 \(process \d+\) is gone; resume=auto"),
        ([(HOST, os.getppid()), (HOST, gone())], r"^rank 2 \(process"),
        ([("elsewhere", 1)], "lost contact with another rank .*1 on elsewhere"),
        ([(HOST, os.getppid())], "which ended by itself"),
    ],
)
def test_what_the_network_says_of_a_lost_peer_becomes_the_name_of_a_rank(
    others: list[tuple[str, int]], said: str
) -> None:
    with pytest.raises(RunFailed, match=said):
        fail(CLOSED, others)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"):
        fail("CUDA out of memory", [])


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_failed_run_leaves_no_process_group(group: None) -> None:
    with pytest.raises(SystemExit), ranks.lost_ranks_named():
        raise SystemExit(143)
    assert not dist.is_initialized()


def test_a_rank_that_failed_does_not_wait_for_the_others_of_nccl(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("it would wait"))
    for error in (ValueError, RuntimeError):
        with pytest.raises(error), ranks.lost_ranks_named():
            raise error("CUDA out of memory")
    monkeypatch.undo()


@pytest.mark.parametrize(("world_size", "kept"), [(1, True), (2, False)])
def test_the_next_run_takes_over_a_process_group_that_fits(group: None, world_size: int, kept: bool) -> None:
    for _ in range(2):
        with ranks.lost_ranks_named():
            assert dist.is_initialized()
    with ranks.lost_ranks_named():
        ranks.RecordRankAddresses().setup(SimpleNamespace(world_size=world_size), None, "fit")  # type: ignore[arg-type]
        assert dist.is_initialized() == kept
