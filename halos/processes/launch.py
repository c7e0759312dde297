"""One process for each device of a run, started and watched by the command itself.

Lightning starts the ranks from inside the first of them: a sweep then repeats itself in each, a rank that dies takes
the first one along without a word, and a signal to one of them leaves the others waiting. Here the command only
watches: it passes signals on, ends the other ranks when one has failed, and says which it was. Nothing is started
where torchrun, SLURM or the user has started the ranks (``LOCAL_RANK`` and its siblings are set).
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from halos.processes.errors import RunFailed
from halos.processes.signals import EXIT_CODE, SIGNALS, Interrupted

ERRORS = "HALOS_ERRORS"
"""The folder in which a rank leaves the message that it failed with."""
GRACE = 4.0
"""Seconds that the other ranks have to end by themselves once a signal has ended one of them."""


def ranks_to_start(cfg: DictConfig) -> int:
    """How many processes the run wants on this machine, if nobody has started them yet; else 0."""
    jobs = os.environ.get("SLURM_JOB_NAME") not in (None, "bash", "interactive") and "SLURM_NTASKS" in os.environ
    if cfg.strategy.name == "auto" or jobs or "LOCAL_RANK" in os.environ:
        return 0
    devices = cfg.trainer.devices
    if isinstance(devices, int) and devices > 0:
        return devices
    from lightning.pytorch import Trainer  # what "auto", "0,2" and their like mean is Lightning's to say

    if OmegaConf.is_config(devices):
        devices = OmegaConf.to_container(devices)
    trainer = Trainer(
        accelerator=cfg.trainer.accelerator,
        devices="auto" if devices is None else devices,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    return trainer.num_devices


def run_ranks(cfg: DictConfig, count: int) -> None:
    """Train as configured in ``count`` processes, and wait for all of them.

    Raises :class:`RunFailed` naming the rank that failed, ``ValueError`` if all of them were refused for the same
    reason, and :class:`Interrupted` if a signal has ended the run. No process is left behind.
    """
    with tempfile.TemporaryDirectory(prefix="halos-") as name:
        folder = Path(name)
        config = folder / "config.yaml"
        config.write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
        ranks: list[subprocess.Popen[bytes]] = []
        port = _free_port()
        try:
            with _passed_on(ranks) as received:
                for rank in range(count):
                    ranks.append(_start(config, rank, count, port))
                    if received.number and len(ranks) < count:  # the others would never hear of it
                        raise Interrupted(received.number)
                codes = _wait(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        _conclude(codes, folder, received.number)


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
    package = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", "-m", "halos.cli", "rank", str(config)]
    return subprocess.Popen(command, env={**os.environ, **environment, "PYTHONPATH": path})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class _Received:
    number: int = 0


@contextmanager
def _passed_on(ranks: list[subprocess.Popen[bytes]]) -> Iterator[_Received]:
    """Pass signals on to the ranks. Ctrl-C reaches them by itself, and a second one would end them at once: they get
    it as SIGTERM."""
    received = _Received()

    def handle(number: int, frame: object) -> None:
        again = number == signal.SIGINT == received.number
        received.number = received.number or number
        for rank in ranks:
            rank.send_signal(signal.SIGKILL if again else signal.SIGTERM if number == signal.SIGINT else number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Wait until all have ended, or until one has failed and the others were given their time; the exit codes, None
    for a rank that is still there."""
    deadline = float("inf")
    # A list: any() would stop at the first rank that is alive and never look at those behind it.
    while None in (polled := [rank.poll() for rank in ranks]) and time.monotonic() < deadline:
        codes = [code for code in polled if code]
        if codes and deadline == float("inf"):
            ended = any(map(_by_signal, codes))
            deadline = time.monotonic() + (GRACE if ended else GRACE / 4)
            for rank in ranks if ended else ():
                rank.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    return [rank.returncode for rank in ranks]


def _by_signal(code: int | None) -> bool:
    # Before its handlers are there, a process dies of the signal itself.
    return code == EXIT_CODE or -(code or 0) in SIGNALS


def _conclude(codes: list[int | None], folder: Path, received: int) -> None:
    if any(map(_by_signal, codes)) or (received and any(codes)):
        raise Interrupted(received or signal.SIGTERM)
    if codes == [0] * len(codes):
        return
    killed = [
        f"rank {n} was killed by {signal.Signals(-code).name}" for n, code in enumerate(codes) if code and code < 0
    ]
    if killed:
        raise RunFailed(f"{', '.join(killed)}; the others were ended; resume=auto goes on from the last checkpoint")
    told = sorted(folder.glob("*.txt"), key=lambda file: file.stat().st_mtime_ns)
    messages = {int(file.stem): file.read_text(encoding="utf-8") for file in told}
    if not messages:
        raise RunFailed(f"the ranks ended with exit codes {codes}")
    first, message = next(iter(messages.items()))
    everywhere = len(messages) == len(codes) and set(messages.values()) == {message}
    raise RunFailed(message if everywhere else f"rank {first}: {message}")


def die_with_parent() -> None:
    """Have this process sent SIGTERM when the one that started it is killed, where the system can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
