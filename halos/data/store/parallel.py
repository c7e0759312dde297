"""A function over many tasks, in several processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_function: Callable[[Any], Any]


def mapped(function: Callable[[T], R], tasks: Sequence[T], workers: int | None = None) -> Iterator[R]:
    """Results in the order of the tasks; the first task that fails raises its error. One task needs no process.

    Raises ``ValueError`` if a process is ended from outside.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    if workers < 2:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start, initargs=(function, os.getpid()))
    try:
        yield from pool.map(_run, tasks)
    except BrokenProcessPool:
        raise ValueError(
            "a process that prepares the data was ended from outside, for want of memory perhaps; "
            "data.num_proc=1 needs least"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A process whose parent was killed would wait for its next task for ever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(task: Any) -> Any:
    return _function(task)
