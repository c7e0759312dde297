"""A rank that dies: the others say which it was instead of what their network library met."""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from halos.processes.collectives import all_gather_list
from halos.processes.errors import RunFailed

_known: list[tuple[str, int]] = []
"""(host, process id) of each rank."""
LOST = ("connection closed by peer", "connection reset by peer", "connection was closed", "broken pipe", "socket")
"""What gloo, NCCL and the store say of a peer that is gone, in lower case."""


class RecordRankAddresses(Callback):
    """Learns where each rank lives, before the first step."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() != trainer.world_size:
            _leave_group()  # that of an earlier run
        if not _known:
            _known.extend(all_gather_list([(socket.gethostname(), os.getpid())], everywhere=True))


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Turn an error that comes from another rank's end into :class:`RunFailed` with its name.

    A failed run leaves no process group behind, unless it is NCCL's. One that went well leaves it to the next run of
    this process, which would hang on a new one if another rank had not yet left the old.
    """
    _known.clear()
    try:
        yield
    except RuntimeError as error:
        _leave_group(failed=True)
        if not any(words in str(error).lower() for words in LOST):
            raise
        raise RunFailed(f"{_gone()}; resume=auto goes on from the last checkpoint") from error
    except BaseException:
        _leave_group(failed=True)
        raise
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group(*, failed: bool = False) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return
    # NCCL's end waits for all ranks, and those that did not fail wait for this one: it just has to die.
    if not (failed and "nccl" in dist.get_backend()):
        dist.destroy_process_group()


def _gone() -> str:
    host = socket.gethostname()
    gone = [
        f"rank {rank} (process {process}) is gone"
        for rank, (place, process) in enumerate(_known)
        if place == host and process != os.getpid() and not _lives(process)
    ]
    if gone:
        return ", ".join(gone)
    elsewhere = [f"{rank} on {place}" for rank, (place, _) in enumerate(_known) if place != host]
    return f"lost contact with another rank ({', '.join(elsewhere) or 'which ended by itself'})"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
        # A process that nobody has waited for is still listed.
        return ") Z " not in Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return True  # no /proc here
    except OSError:
        return False
