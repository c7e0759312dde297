"""When a rank dies, the other ranks report which one it was, instead of an error of their network library."""

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

_addresses: list[tuple[str, int]] = []
"""Host and process id of each rank."""
LOST = ("connection closed by peer", "connection reset by peer", "connection was closed", "broken pipe", "socket")
"""Parts of the error messages of gloo, NCCL and the store when another rank is gone, in lower case."""

NO_GRADIENT = (
    "strategy: expected a gradient for each trained weight, found weights that the loss does not depend on, for which "
    "ddp waits; set strategy=fsdp"
)


class RecordRankAddresses(Callback):
    """Gathers the host and process id of each rank before the first step."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() != trainer.world_size:
            _leave_group()  # of an earlier run of this process, on other devices
        if not _addresses:
            _addresses.extend(all_gather_list([(socket.gethostname(), os.getpid())], everywhere=True))


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Turn an error that another rank's end has caused into :class:`RunFailed`, which names that rank.

    A failed run destroys its process group, unless that is NCCL's. A successful run keeps it for the next run of this
    process: that one would hang if it made a new group while another rank has not yet left the old one.
    """
    _addresses.clear()
    try:
        yield
    except RuntimeError as error:
        _leave_group(failed=True)
        if "find_unused_parameters" in str(error):  # Lightning's hint names a strategy that is not an option here
            raise ValueError(NO_GRADIENT) from error
        if not any(words in str(error).lower() for words in LOST):
            raise
        raise RunFailed(f"{_lost_ranks()}; resume=auto goes on from the last checkpoint") from error
    except BaseException:
        _leave_group(failed=True)
        raise
    # The last run's group is left at exit; registered once, however many runs there are.
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group(*, failed: bool = False) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return
    # Destroying an NCCL group would wait for all ranks, while the others wait for this one in a collective. So a failed
    # rank simply ends, which the others notice.
    if not (failed and "nccl" in dist.get_backend()):
        dist.destroy_process_group()


def _lost_ranks() -> str:
    this_host = socket.gethostname()
    lost = [
        f"rank {rank} (process {process}) is gone"
        for rank, (host, process) in enumerate(_addresses)
        if host == this_host and process != os.getpid() and not _runs(process)
    ]
    if lost:
        return ", ".join(lost)
    # Processes of other hosts cannot be looked at.
    elsewhere = [f"{rank} on {host}" for rank, (host, _) in enumerate(_addresses) if host != this_host]
    return f"lost contact with another rank ({', '.join(elsewhere) or 'which ended by itself'})"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing, and fails if there is no such process
        # A zombie, which has ended and which its parent has not waited for yet, is still listed.
        return ") Z " not in Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return True  # no /proc here
    except OSError:
        return False
