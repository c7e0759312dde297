"""Run a function on several CPU processes at once, each of which a Lightning Trainer takes for one rank.

The processes are forked from a server that has imported the libraries and computed nothing: forking the test process
itself would copy its OpenMP and autograd threads, with which a child hangs or refuses to differentiate.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "halos.commands.train",
        "pytest",
        "torchmetrics.functional.classification",
        "transformers.models.llama.modeling_llama",
    ]
)
allowed = True
"""Whether the test that runs is marked as one that starts ranks."""
_GRACE = 3.0
"""Seconds that the other ranks have to end by themselves once one has failed."""


def run_ranks(function: Callable[[], Any], ranks: int = 2, *, timeout: float = 120.0) -> list[Any]:
    """What ``function()`` returns on each rank, in order.

    ``function`` and its results travel by pickle: a function of a module or a ``functools.partial`` of one, no lambda
    or closure. LOCAL_RANK and its siblings are set, so that ``Trainer(devices=ranks, strategy="ddp")`` starts no
    processes of its own; a function without a Trainer calls ``dist.init_process_group("gloo")`` first.

    Raises ``RuntimeError`` with the tracebacks of the ranks that failed, and ``TimeoutError`` (after killing all)
    if any has not ended in time.
    """
    if not allowed:
        raise RuntimeError("a test that starts ranks needs @pytest.mark.ranks")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        files = [Path(folder, f"{rank}.pickle") for rank in range(ranks)]
        processes = [
            _context.Process(target=_run_rank, args=(function, rank, ranks, port, file), daemon=True)
            for rank, file in enumerate(files)
        ]
        for process in processes:
            process.start()
        late = _wait(processes, timeout)
        results = [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]
    errors = [f"rank {rank}:\n{result[1]}" for rank, result in enumerate(results) if result and not result[0]]
    if errors:
        raise RuntimeError("\n".join(errors))
    if late:
        raise TimeoutError(f"ranks {late} of {ranks} had not ended after {timeout:g} s")
    missing = {rank: process.exitcode for rank, process in enumerate(processes) if results[rank] is None}
    if missing:
        raise RuntimeError(f"ranks ended without a result, with exit codes {missing}")
    return [value for _, value in results]


def _wait(processes: list[Any], timeout: float) -> list[int]:
    # The ranks that had to be killed.
    deadline = time.monotonic() + timeout
    failed = False
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if not failed and any(process.exitcode not in (None, 0) for process in processes):
            failed = True
            deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.01)
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in late:
        processes[rank].kill()
    for process in processes:
        process.join()
    return late


def _run_rank(function: Callable[[], Any], rank: int, ranks: int, port: int, file: Path) -> None:
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    try:
        _write(file, (True, function()))
    except BaseException:  # whatever it was, the parent has to hear of it
        _write(file, (False, traceback.format_exc()))
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _write(file: Path, result: tuple[bool, Any]) -> None:
    data = pickle.dumps(result)
    part = file.with_suffix(".part")
    part.write_bytes(data)
    part.rename(file)
