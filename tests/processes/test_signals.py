"""Signals: a note where ranks wait for each other, the end anywhere else."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from halos.processes import signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    with signals.caught():
        yield


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_ends_what_nobody_waits_for_with_the_agreed_exit_code(number: int) -> None:
    with pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), number)
    assert end.value.code == 143
    assert isinstance(end.value, signals.Interrupted)
    assert end.value.signal == number


def test_where_ranks_wait_for_each_other_a_signal_is_noted_only() -> None:
    assert signals.defer(True) is False
    assert signals.received() == 0
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)  # the first one counts
    assert signals.received() == signal.SIGTERM
    with pytest.raises(signals.Interrupted):
        signals.stop(signals.received())
    signals.stop(0)


def test_handlers_are_put_back_and_may_be_nested(tmp_path: Path) -> None:
    code = """
import signal
from halos.processes import signals
before = [signal.getsignal(number) for number in signals.SIGNALS]
with signals.caught(), signals.caught():
    inside = [signal.getsignal(number) for number in signals.SIGNALS]
print(before == [signal.getsignal(number) for number in signals.SIGNALS] != inside)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


def test_a_signal_that_ended_one_run_does_not_end_the_next() -> None:
    code = """
import os, signal
from halos.processes import signals
try:
    with signals.caught():
        signals.defer(True)
        os.kill(os.getpid(), signal.SIGTERM)
        signals.stop(signals.received())
except signals.Interrupted:
    print(signals.received(), signals.defer(False))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "0 False\n"


def test_ctrl_c_twice_ends_a_process_where_it_stands() -> None:
    code = """
import os, signal
from halos.processes import signals
with signals.caught():
    signals.defer(True)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        print("noted", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        print("never")
    finally:
        print("never")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "noted\n")


def test_slurm_is_asked_to_run_the_job_again_for_usr1_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$2" != 7 ]\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    asked = tmp_path / "asked"

    def end(number: int) -> None:
        with pytest.raises(signals.Interrupted):
            signals.stop(number)

    end(signal.SIGUSR1)  # not under SLURM
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    end(signal.SIGTERM)
    assert not asked.exists()
    end(signal.SIGUSR1)
    assert asked.read_text() == "requeue 5\n"
    monkeypatch.setenv("SLURM_PROCID", "1")  # one rank asks for all
    end(signal.SIGUSR1)
    assert asked.read_text() == "requeue 5\n"
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    end(signal.SIGUSR1)
    assert asked.read_text() == "requeue 5\nrequeue 4_2\n"
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # refused
    end(signal.SIGUSR1)
    assert "SLURM job 7 could not be requeued" in capsys.readouterr().err
