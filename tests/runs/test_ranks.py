"""A rank that is gone is named."""

import os
import socket
import subprocess
import sys

import pytest

from halos.errors import RunFailed
from halos.runs import ranks

HOST = socket.gethostname()
CLOSED = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3133"


def gone() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def fail(message: str, others: list[tuple[str, int]]) -> None:
    with ranks.lost_ranks_named():
        ranks._known.extend([(HOST, os.getpid()), *others])
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
