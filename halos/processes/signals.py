"""Ends a run cleanly on a signal: SIGTERM, SIGINT, or SIGUSR1 (which SLURM sends before the time limit).

1. While ranks wait for each other, signals are deferred (:func:`defer`): the handler only stores the number.
2. At the next point where all ranks exchange the number (:func:`.all_max`), all of them end together. These points are
   an optimizer step, a validation batch, and a forward pass of the reference.
3. Anywhere else the handler raises :class:`Interrupted` immediately.

A second SIGINT (Ctrl-C twice) ends the process immediately.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

EXIT_CODE = 143
"""Exit code of every run that a signal has ended: the code that a shell reports for SIGTERM."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 5.0
"""Seconds that an interrupted process has to end by itself, because its shutdown may wait for a lost rank forever."""


class Interrupted(SystemExit):
    """The run ends because of a signal, with :data:`EXIT_CODE`. Finished results are kept."""

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_CODE)
        self.signal = signal.Signals(number)

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        # Pickled by its argument, because a worker process of a sweep sends it to the process that started it.
        return type(self), (self.signal,)


@dataclass(slots=True)
class _State:
    received: int = 0
    deferred: bool = False
    deadline: threading.Timer | None = None


_state = _State()


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let this function handle the signals inside the block. Afterwards the previous handlers are restored."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def caught() -> Iterator[None]:
    """Handle the signals inside the block; afterwards handlers and state are as before.

    Nothing is done inside another such block, and outside of the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is handle:
        yield
        return
    _state.received, _state.deferred = 0, False
    with handled_by(handle):
        try:
            yield
        finally:
            if _state.deadline is not None:
                _state.deadline.cancel()
            _state.deadline = None
            _state.received, _state.deferred = 0, False  # what runs next in this process is not the run that was ended


def defer(deferred: bool) -> bool:
    """Start or stop deferring signals until ranks exchange them; return whether they were deferred before."""
    before, _state.deferred = _state.deferred, deferred
    return before


def received() -> int:
    """Return the number of the first signal that this process has received, 0 for none."""
    return _state.received


def stop(number: int) -> None:
    """End the run because of this signal; nothing is done for 0.

    For SIGUSR1 SLURM is asked to run the job again. Where ranks wait for each other, all of them must call this with
    the same number.

    Raises:
        Interrupted: for any number but 0.
    """
    if not number:
        return
    if number == signal.SIGUSR1:
        _requeue()
    _start_deadline()
    raise Interrupted(number)


def handle(number: int, frame: object) -> None:
    """Handle a signal. Python calls this between two instructions of whatever code is running."""
    if number == signal.SIGINT == _state.received:
        os._exit(128 + number)
    first, _state.received = not _state.received, _state.received or number
    if not first:
        return
    end = "at the next step" if _state.deferred else "now"
    # Not print(): the signal may have interrupted a print(), and its buffer cannot be entered twice.
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
    if job is None or os.environ.get("SLURM_PROCID", "0") != "0":  # one rank asks for all
        return
    try:
        # SLURM's own program, wherever the cluster has it, and no shell; SLURM has set the job's number.
        words = ["scontrol", "requeue", job]
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=30)  # noqa: S603 (no shell)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"SLURM job {job} could not be requeued: {error}", file=sys.stderr)
