"""Sweeps whose jobs run at the same time in processes of their own on this machine (``hydra/launcher=joblib``).

joblib kills its processes as soon as the one that started them is interrupted, or one of them ends by a signal. So the
first waits for the jobs and passes signals on, and a job that a signal ends fails like any other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from halos.processes import signals
from halos.processes.errors import RunFailed
from halos.processes.launch import die_with_parent

SWEEP = "HALOS_SWEEP"
"""The process id of the command that has started a sweep."""
FAILED = "HALOS_FAILED_JOBS"
"""The file in which jobs, in whatever process, leave their names when they fail."""
_received: list[int] = []


@contextmanager
def passed_on_to_jobs() -> Iterator[None]:
    """Within, signals are passed on to processes that run jobs, which end with a checkpoint each; a second SIGINT
    (Ctrl-C twice) kills them. Without such processes everything is as :func:`halos.processes.signals.caught` has it.

    Raises :class:`halos.processes.signals.Interrupted` in the place of what the jobs' ends have led to.
    """
    os.environ[SWEEP] = str(os.getpid())
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}

    def handle(number: int, frame: object) -> None:
        jobs = multiprocessing.active_children()
        if not jobs:
            signals.handle(number, frame)
        received.append(number)
        for job in jobs:
            if received.count(signal.SIGINT) > 1:
                job.kill()
            else:  # Ctrl-C has reached them by itself: a second SIGINT would end them where they stand
                os.kill(job.pid or 0, signal.SIGTERM if number == signal.SIGINT else number)

    for number in signals.SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    except Exception as error:
        if received:
            raise signals.Interrupted(received[0]) from error
        raise
    finally:
        del os.environ[SWEEP]
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def failures_counted(explain: Callable[[BaseException], str]) -> Iterator[None]:
    """Around a sweep, whose launcher lets the other jobs run when one has failed.

    Raises :class:`RunFailed` that names all jobs that failed, in the place of the first one's error.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "failed.txt"
        file.touch()
        os.environ[FAILED] = str(file)
        try:
            yield
        except Exception as error:
            if failed := _failed(file):
                raise RunFailed(f"{failed}: {explain(error)}") from error
            raise
        finally:
            del os.environ[FAILED]
        if failed := _failed(file):  # a sweeper that goes on with other settings
            print(failed, file=sys.stderr)


def _failed(file: Path) -> str:
    names = file.read_text(encoding="utf-8").splitlines()
    return f"{len(names)} {'job' if len(names) == 1 else 'jobs'} failed ({'; '.join(names)})" if names else ""


@contextmanager
def failure_told(name: str, explain: Callable[[BaseException], str]) -> Iterator[None]:
    """Around a job: of a sweep, its failure is printed at once, as the sweep's other jobs may take hours."""
    try:
        yield
    except Exception as error:
        if file := os.environ.get(FAILED):
            print(f"job {name}: error: {explain(error)}", file=sys.stderr, flush=True)
            with suppress(OSError), Path(file).open("a", encoding="utf-8") as stream:  # it may run on another machine
                stream.write(f"{name}\n")
        raise


@contextmanager
def job() -> Iterator[None]:
    """Around a job, wherever it runs. In a process that the sweep has started, a signal that ends it, or has ended an
    earlier one there, is :class:`RunFailed`, and signals between jobs do no harm; once the sweep is gone they end the
    process."""
    if not _of_a_sweep():
        yield
        return
    if not _received:
        die_with_parent()
    for number in signals.SIGNALS:
        signal.signal(number, _note)
    try:
        with signals.caught():
            if _received:
                raise signals.Interrupted(_received[0])
            yield
    except signals.Interrupted as end:
        _note(end.signal, None)
        raise RunFailed(f"ended by {end.signal.name}; resume=auto goes on from the last checkpoint") from end


def _of_a_sweep() -> bool:
    return os.environ.get(SWEEP) == str(os.getppid())


def _note(number: int, frame: object) -> None:
    _received.append(number)
    if not _of_a_sweep():
        os._exit(signals.EXIT_CODE)
