"""Signals that ask a run to end: SIGTERM, SIGINT, and SIGUSR1 (SLURM's, before a job's time is up).

Where ranks wait for each other the handler only takes a note, and all ranks end together at the next place where they
compare notes (:func:`.all_max`): an optimizer step, a validation batch, a forward of the reference
pass. Anywhere else it raises :class:`Interrupted` at once. A second SIGINT (Ctrl-C twice) ends the process where it
stands.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

EXIT_CODE = 143
"""Of every run that a signal has ended, as a shell reports it for SIGTERM."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 5.0
"""Seconds that an interrupted process has to end by itself: a teardown that waits for lost ranks may hang."""


class Interrupted(SystemExit):
    """The run ends because of a signal, with :data:`EXIT_CODE`; what it had finished is kept."""

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_CODE)
        self.signal = signal.Signals(number)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.signal,)  # from a sweep's own process to the one that started it


@dataclass(slots=True)
class _State:
    received: int = 0
    deferred: bool = False
    deadline: threading.Timer | None = None


_state = _State()


@contextmanager
def caught() -> Iterator[None]:
    """Handle the signals inside; outside, everything is as it was. Does nothing off the main thread
    and inside itself."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is handle:
        yield
        return
    _state.received, _state.deferred = 0, False
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        if _state.deadline is not None:
            _state.deadline.cancel()
        _state.deadline = None
        _state.received, _state.deferred = 0, False  # what runs next in this process is not the run that was ended
        for number, handler in before.items():
            signal.signal(number, handler)


def defer(deferred: bool) -> bool:
    """Whether signals wait from now on until the ranks compare notes; returns what held before."""
    before, _state.deferred = _state.deferred, deferred
    return before


def received() -> int:
    """The number of the signal that this process has been sent, 0 for none."""
    return _state.received


def stop(number: int) -> None:
    """End the run for the signal of this number, after having asked SLURM to run it again if that is what it means.

    Returns only for 0. Where ranks wait for each other all have to call it with the same number.
    """
    if not number:
        return
    if number == signal.SIGUSR1:
        _requeue()
    _start_deadline()
    raise Interrupted(number)


def handle(number: int, frame: object) -> None:
    if number == signal.SIGINT == _state.received:
        os._exit(128 + number)
    first, _state.received = not _state.received, _state.received or number
    if not first:
        return
    end = "at the next step" if _state.deferred else "now"
    os.write(2, f"{signal.Signals(number).name}: ending {end}\n".encode())
    if not _state.deferred:
        stop(number)


def _start_deadline() -> None:
    if _state.deadline is None and threading.current_thread() is threading.main_thread():
        _state.deadline = threading.Timer(GRACE, os._exit, (EXIT_CODE,))
        _state.deadline.daemon = True
        _state.deadline.start()


def _requeue() -> None:
    job = os.environ.get("SLURM_JOB_ID")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is None or os.environ.get("SLURM_PROCID", "0") != "0":
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"SLURM job {job} could not be requeued: {error}", file=sys.stderr)
