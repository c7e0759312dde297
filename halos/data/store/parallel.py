"""A function applied to many tasks in several processes."""

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
"""The function of this worker process: passed once, as it may hold much data, and not with every task."""


def mapped(function: Callable[[T], R], tasks: Sequence[T], workers: int | None = None) -> Iterator[R]:
    """Yield the results of a function in the order of the tasks.

    Args:
        function: applied to each task.
        tasks: a single task is run in this process.
        workers: number of processes; None for one on each core.

    Raises:
        ValueError: if a process is killed. An error of ``function`` is raised as it is, the first one in order.
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
            "data.num_proc: a process that prepares the data was killed, perhaps for lack of memory; "
            "data.num_proc=1 needs least"
        ) from None
    finally:
        # After an error the other tasks are not worth waiting for.
        pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    # The terminal sends Ctrl-C to the workers too; they ignore it, as the parent ends the pool. A handler of SIGTERM
    # that the parent has set is for the parent: without it SIGTERM ends a worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # There are as many processes as cores already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """End this process once its parent was killed; it would wait for its next task forever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(task: Any) -> Any:
    return _function(task)
