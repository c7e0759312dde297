"""Jobs of a sweep in processes of their own: a signal ends each as it would end a run by itself."""

import os
import pickle
import signal
import subprocess
import sys

import pytest

from halos.processes import signals, sweeps

HEAD = """
import multiprocessing, os, signal, time
from halos.processes import signals, sweeps
from halos.processes.errors import RunFailed

context = multiprocessing.get_context("fork")
queue, ready = context.SimpleQueue(), context.Event()

def train():
    signals.defer(True)
    ready.set()
    while not signals.received():
        time.sleep(0.01)
    time.sleep(0.3)
    print("saved", flush=True)
    signals.stop(signals.received())

def work():
    for _ in range(2):
        try:
            with sweeps.job():
                train()
        except RunFailed as error:
            queue.put(str(error))

try:
    with signals.caught(), sweeps.passed_on_to_jobs():
        process = context.Process(target=work)
        process.start()
        ready.wait()
"""
TAIL = """
        process.join()
        raise RunFailed("a job failed")
except signals.Interrupted as end:
    while not queue.empty():
        print(queue.get())
    print(process.exitcode, end.signal.name, end.code)
"""


def run(*numbers: int) -> list[str]:
    """What is printed when a sweep whose one process trains is sent these signals."""
    kills = "".join(f"        os.kill(os.getpid(), {int(number)})\n" for number in numbers)
    done = subprocess.run([sys.executable, "-c", HEAD + kills + TAIL], capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines() or [done.stderr]


@pytest.mark.parametrize(("number", "told"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGTERM")])
def test_the_sweep_waits_for_its_jobs_which_save_and_start_no_others(number: int, told: str) -> None:
    failed = f"ended by {told}; resume=auto goes on from the last checkpoint"
    assert run(number) == ["saved", failed, failed, f"0 {signal.Signals(number).name} 143"]


def test_ctrl_c_twice_kills_the_jobs() -> None:
    assert run(signal.SIGINT, signal.SIGINT) == ["-9 SIGINT 143"]


def test_when_the_sweep_is_killed_its_jobs_save_and_are_gone() -> None:
    assert run(signal.SIGKILL) == ["saved"]  # what is printed ends with the last process


def test_without_processes_of_its_own_a_sweep_ends_at_once() -> None:
    with signals.caught(), pytest.raises(signals.Interrupted), sweeps.passed_on_to_jobs(), sweeps.job():
        os.kill(os.getpid(), signal.SIGTERM)
    assert sweeps.SWEEP not in os.environ


def test_the_end_by_a_signal_travels_between_processes() -> None:
    end = pickle.loads(pickle.dumps(signals.Interrupted(signal.SIGUSR1)))
    assert (end.signal, end.code) == (signal.SIGUSR1, 143)
