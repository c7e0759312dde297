"""Sweeps whose jobs run at the same time in worker processes on this machine (``hydra/launcher=joblib``).

joblib kills its workers as soon as the process that started them is interrupted, or one of them ends by a signal. Jobs
would then have no time to save a checkpoint. So:

1. The command forwards signals to the workers, and keeps waiting for them (:func:`passed_on_to_jobs`).
2. In a worker, a job that is ended by a signal raises :class:`RunFailed`, like any job that fails, and the worker
   stays alive (:func:`job`). Further jobs in this worker fail immediately.
3. When all jobs have ended, the command raises :class:`.signals.Interrupted` in place of the jobs' failures.
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
"""Environment variable: the process id of the command that started the sweep."""
FAILED = "HALOS_FAILED_JOBS"
"""Environment variable: the file to which failed jobs of all processes append their names."""
_received: list[int] = []
"""Signals that this worker has received, in all of its jobs."""


@contextmanager
def passed_on_to_jobs() -> Iterator[None]:
    """Forward signals to the worker processes, whose jobs end with a checkpoint each.

    A second SIGINT (Ctrl-C twice) kills them. While there are no workers, signals are handled as by
    :func:`halos.processes.signals.caught`.

    Raises:
        Interrupted: a signal was forwarded. It replaces the error that the ended jobs have caused.
    """
    os.environ[SWEEP] = str(os.getpid())
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        jobs = multiprocessing.active_children()
        if not jobs:
            signals.handle(number, frame)
        received.append(number)
        for job in jobs:
            if received.count(signal.SIGINT) > 1:
                job.kill()
            else:
                # On Ctrl-C the terminal sends SIGINT to the workers too, and a second one would end them immediately.
                os.kill(job.pid or 0, signal.SIGTERM if number == signal.SIGINT else number)

    try:
        with signals.handled_by(handle):
            yield
    except Exception as error:
        if received:
            raise signals.Interrupted(received[0]) from error
        raise
    finally:
        del os.environ[SWEEP]


@contextmanager
def failures_counted(explain: Callable[[BaseException], str]) -> Iterator[None]:
    """Report all failed jobs of a sweep. By itself the launcher runs the other jobs, and then raises the first error.

    Args:
        explain: returns the line that is printed for an error.

    Raises:
        RunFailed: a job failed; the error names all jobs that did.
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
        if failed := _failed(file):  # the sweeper tolerated the failures and tried other settings
            print(failed, file=sys.stderr)


def _failed(file: Path) -> str:
    names = file.read_text(encoding="utf-8").splitlines()
    return f"{len(names)} {'job' if len(names) == 1 else 'jobs'} failed ({'; '.join(names)})" if names else ""


@contextmanager
def failure_printed(name: str, explain: Callable[[BaseException], str]) -> Iterator[None]:
    """In a sweep, print the failure of a job immediately, because the other jobs may take hours."""
    try:
        yield
    except Exception as error:
        if file := os.environ.get(FAILED):
            print(f"job {name}: error: {explain(error)}", file=sys.stderr, flush=True)
            # A job on another machine cannot open the file.
            with suppress(OSError), Path(file).open("a", encoding="utf-8") as stream:
                stream.write(f"{name}\n")
        raise


@contextmanager
def job() -> Iterator[None]:
    """Run a job of a sweep, or a single run, inside the block.

    In a worker process a signal that ends the job, or that has ended an earlier job there, becomes :class:`RunFailed`.
    A signal between two jobs is only recorded. If the command has already ended, it ends the worker.
    """
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
