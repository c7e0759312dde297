"""Starts one process for each device of a run, and watches them.

Lightning would start the other ranks from inside the first one. Then every rank would repeat a sweep, a rank that dies
would end the first one without a message, and a signal to one rank would leave the others waiting. Here the command is
a process of its own that does not train:

1. It writes the resolved configuration to a file and starts ``halos rank FILE`` once for each device.
2. It forwards signals to the ranks.
3. When a rank fails it ends the others, and reports which one failed and why.

Nothing is started where torchrun, SLURM or the user has started the ranks (``LOCAL_RANK`` or SLURM's variables are
set).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf

from halos.processes.errors import RunFailed
from halos.processes.signals import EXIT_CODE, SIGNALS, Interrupted, handled_by

Result = TypeVar("Result")
ERRORS = "HALOS_ERRORS"
"""Environment variable: the folder in which a rank that fails writes its message."""
GRACE = 4.0
"""Seconds that the other ranks have to end by themselves after a signal has ended one; after a failure, a quarter."""


def ranks_to_start(cfg: DictConfig) -> int:
    """Return how many processes the run has on this machine.

    0 with ``strategy=auto``, and where torchrun, SLURM or the user has started them.

    Raises:
        ValueError: this machine has fewer GPUs than the run is to use.
    """
    # In an interactive job of SLURM (salloc) the command starts the ranks itself.
    jobs = os.environ.get("SLURM_JOB_NAME") not in (None, "bash", "interactive") and "SLURM_NTASKS" in os.environ
    if cfg.strategy.name == "auto" or jobs or "LOCAL_RANK" in os.environ:
        return 0
    devices = cfg.trainer.devices
    count = devices if isinstance(devices, int) else len(devices) if OmegaConf.is_list(devices) else 1
    check_gpus(str(cfg.trainer.accelerator or "auto"), count)
    if isinstance(devices, int) and devices > 0:
        return devices
    from lightning.pytorch import Trainer  # only Lightning knows what "auto", "0,2" and the like mean here

    if OmegaConf.is_config(devices):
        devices = list(devices)
    devices = "auto" if devices is None else devices
    return Trainer(accelerator=cfg.trainer.accelerator, devices=devices, strategy="ddp", logger=False).num_devices


def check_gpus(accelerator: str, count: int) -> None:
    """Check that this machine has enough GPUs, before each of several processes finds out for itself.

    Args:
        accelerator: Lightning's name.
        count: how many GPUs the run uses if it runs on GPUs.

    Raises:
        ValueError: this machine has fewer GPUs.
    """
    if accelerator not in ("auto", "gpu", "cuda"):
        return
    import torch  # slow to import; counting initialises no device

    gpus = torch.cuda.device_count()
    if accelerator != "auto" and not (gpus or torch.backends.mps.is_available()):
        raise ValueError(f"trainer.accelerator: expected one of this machine, such as cpu, found {accelerator}")
    if 0 < gpus < count:
        raise ValueError(f"trainer.devices: expected up to {gpus}, the GPUs of this machine, found {count}")


def on_devices(cfg: DictConfig, job: Callable[[DictConfig], Result]) -> Result | None:
    """For one device, call ``job`` here and return its result; for several, start one process each and return None."""
    if (count := ranks_to_start(cfg)) <= 1:
        return job(cfg)
    run_ranks(cfg, count)
    return None


def run_ranks(cfg: DictConfig, count: int) -> None:
    """Train as configured in ``count`` processes, and wait for all of them; no process is left running.

    Raises:
        RunFailed: a rank has failed. The error has its number and message, or only the message if all ranks have it.
        Interrupted: a signal has ended the run.
    """
    with tempfile.TemporaryDirectory(prefix="halos-") as name:
        folder = Path(name)
        config = folder / "config.yaml"
        config.write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
        ranks: list[subprocess.Popen[bytes]] = []
        port = _free_port()
        try:
            with _forwarded_signals(ranks) as received:
                for rank in range(count):
                    ranks.append(_start(config, rank, count, port))
                    # A signal during this loop was forwarded only to the ranks that had been started.
                    if received and len(ranks) < count:
                        raise Interrupted(received[0])
                codes = _wait(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        _conclude(codes, folder, received)


def _start(config: Path, rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
    node = int(os.environ.get("NODE_RANK", "0"))
    environment = {
        "LOCAL_RANK": str(rank),
        "RANK": str(node * count + rank),
        "NODE_RANK": str(node),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(port)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))),
        ERRORS: str(config.parent),
    }
    # -P and the package's own folder on the path: a module in the user's folder with the name of one of ours, or of one
    # of the standard library, must not be imported instead.
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", "-m", "halos.cli", "rank", str(config)]
    environment = {**os.environ, **environment, "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment)  # noqa: S603 (this very program, and no shell)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _forwarded_signals(ranks: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forward signals to the ranks in the list, which may grow; yield the list of the signals received so far.

    On Ctrl-C the terminal sends SIGINT to every rank by itself, and a second SIGINT would kill them immediately. So
    SIGINT is forwarded as SIGTERM, which a rank ignores after the first SIGINT. Ctrl-C twice kills them.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        twice = len(received) > 1 and number == signal.SIGINT == received[0]
        forwarded = signal.SIGTERM if number == signal.SIGINT else number
        for rank in ranks:
            rank.send_signal(signal.SIGKILL if twice else forwarded)

    with handled_by(handle):
        yield received


def _wait(ranks: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Wait until all ranks have ended, or one has failed and the time for the others is over; return the exit codes.

    The code of a rank that is still running is None.
    """
    deadline = float("inf")
    # poll() collects a rank's exit code, so every rank is polled each time; any() would stop at the first that runs.
    while None in (polled := [rank.poll() for rank in ranks]) and time.monotonic() < deadline:
        codes = [code for code in polled if code]
        if codes and deadline == float("inf"):
            by_signal = any(map(_by_signal, codes))
            # After a signal the others save a checkpoint. After a failure they only get the time to report the same.
            deadline = time.monotonic() + (GRACE if by_signal else GRACE / 4)
            for rank in ranks if by_signal else ():
                rank.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    return [rank.returncode for rank in ranks]


def _by_signal(code: int | None) -> bool:
    # A process that has not set its handlers yet is ended by the signal itself, with a negative code.
    return code == EXIT_CODE or -(code or 0) in SIGNALS


def _conclude(codes: list[int | None], folder: Path, received: list[int]) -> None:
    if any(map(_by_signal, codes)) or (received and any(codes)):
        raise Interrupted(received[0] if received else signal.SIGTERM)
    if codes == [0] * len(codes):
        return
    killed = {n: signal.Signals(-code).name for n, code in enumerate(codes) if code and code < 0}
    if killed:
        listed = ", ".join(f"rank {n} was killed by {name}" for n, name in killed.items())
        raise RunFailed(f"{listed}; the others were ended; resume=auto goes on from the last checkpoint")
    # The earliest message is the cause: the other ranks fail because they lose contact with that rank.
    files = sorted(folder.glob("*.txt"), key=lambda file: file.stat().st_mtime_ns)
    messages = {int(file.stem): file.read_text(encoding="utf-8") for file in files}
    if not messages:
        raise RunFailed(f"the ranks ended with exit codes {codes}")
    first, message = next(iter(messages.items()))
    everywhere = len(messages) == len(codes) and set(messages.values()) == {message}
    raise RunFailed(message if everywhere else f"rank {first}: {message}")


def die_with_parent() -> None:
    """Make Linux send SIGTERM to this process when the one that started it is killed; elsewhere nothing is done."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
