"""A function over tasks in several processes: order, errors, and processes that are ended."""

import os
import signal
import time
from pathlib import Path

import pytest

from halos.data.store.parallel import mapped


def squared(n: int) -> tuple[int, int]:
    return n * n, os.getpid()


def failing(n: int) -> int:
    if n % 3 == 1:
        raise ValueError(f"task {n}")
    return n


def test_results_come_in_the_order_of_the_tasks_from_as_many_processes_as_asked() -> None:
    found = list(mapped(squared, range(20), workers=2))
    assert [square for square, _ in found] == [n * n for n in range(20)]
    assert os.getpid() not in {process for _, process in found}


@pytest.mark.parametrize(("tasks", "workers"), [([3], 8), ([3, 4], 1), ([], 2)])
def test_one_task_or_one_worker_needs_no_process(tasks: list[int], workers: int) -> None:
    assert list(mapped(squared, tasks, workers)) == [(n * n, os.getpid()) for n in tasks]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_task_that_fails_raises_its_error(workers: int) -> None:
    with pytest.raises(ValueError, match=r"^task 1$"):
        list(mapped(failing, range(9), workers))


def end_self(n: int) -> None:
    if n == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_an_error_that_says_so() -> None:
    with pytest.raises(
        ValueError, match=r"^data\.num_proc: a process that prepares the data was killed.*data\.num_proc=1"
    ):
        list(mapped(end_self, range(4), workers=2))


def wait_named(file: Path) -> None:
    file.write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(60)


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "two")]
    if (parent := os.fork()) == 0:
        try:
            list(mapped(wait_named, files, workers=2))
        finally:
            os._exit(0)
    try:
        children = [int(_written(file)) for file in files]
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    deadline = time.monotonic() + 20
    while any(map(_runs, children)):
        assert time.monotonic() < deadline, "they wait for tasks that nobody gives them"
        time.sleep(0.05)


def _written(file: Path) -> str:
    deadline = time.monotonic() + 20
    while not (file.is_file() and file.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return file.read_text(encoding="utf-8")


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
