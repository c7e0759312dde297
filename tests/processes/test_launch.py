"""The command that starts and watches ranks; the ranks here are small scripts."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from halos.processes import launch
from halos.processes.errors import RunFailed
from halos.processes.signals import Interrupted
from tests.configs import compose

FAIL = """
import os, sys, pathlib
pathlib.Path(sys.argv[1], os.environ["LOCAL_RANK"] + ".txt").write_text({!r})
sys.exit(1)
"""
WAIT = "import time; time.sleep(600)"
STOP = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("ready", flush=True)
time.sleep(60)
"""


def run_as(monkeypatch: pytest.MonkeyPatch, *scripts: str) -> list[subprocess.Popen[bytes]]:
    """Run one script as each rank; the processes, all of which have ended."""
    started = []

    def start(config: Path, rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
        assert config.exists()
        command = [sys.executable, "-c", scripts[rank], str(config.parent)]
        started.append(subprocess.Popen(command, env={**os.environ, "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE))
        return started[-1]

    monkeypatch.setattr(launch, "_start", start)
    monkeypatch.setattr(launch, "GRACE", 1.0)
    try:
        launch.run_ranks(compose("output_dir=out"), len(scripts))
    finally:
        assert all(process.poll() is not None for process in started)
    return started


@pytest.mark.parametrize(
    ("gpus", "accelerator", "devices", "message"),
    [
        (0, "gpu", "2", r"trainer\.accelerator: expected one of this machine, such as cpu, found gpu"),
        (0, "cuda", "[0,1]", r"trainer\.accelerator: expected one of this machine, such as cpu, found cuda"),
        (0, "gpu", "auto", r"trainer\.accelerator: expected one of this machine, such as cpu, found gpu"),
        (1, "gpu", "2", r"trainer\.devices: expected up to 1, the GPUs of this machine, found 2"),
        (3, "auto", "[0,1,2,3]", r"trainer\.devices: expected up to 3, the GPUs of this machine, found 4"),
    ],
)
def test_gpus_that_are_not_there_are_refused_before_a_rank_starts(
    monkeypatch: pytest.MonkeyPatch, gpus: int, accelerator: str, devices: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(launch, "_start", lambda *_: pytest.fail("a rank was started"))
    cfg = compose("strategy=ddp", f"trainer.accelerator={accelerator}", f"trainer.devices={devices}", "output_dir=out")
    with pytest.raises(ValueError, match=message):
        launch.on_devices(cfg, lambda _: pytest.fail("the job was called"))


def test_as_many_gpus_as_there_are_and_any_number_of_cpus_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, accelerator, count in ((2, "gpu", 2), (0, "auto", 8), (0, "cpu", 8), (8, "cpu", 16)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        launch.check_gpus(accelerator, count)


def test_ranks_that_succeed_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [process.returncode for process in run_as(monkeypatch, "import time; time.sleep(0.3)", "")] == [0, 0]


def test_a_rank_that_is_killed_is_named_and_the_others_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(RunFailed, match="rank 1 was killed by SIGKILL; the others"):
        run_as(monkeypatch, WAIT, kill)
    with pytest.raises(RunFailed, match="rank 1 was killed by SIGKILL"):  # whatever the others say of it
        run_as(monkeypatch, FAIL.format("connection closed"), kill)
    assert time.monotonic() - begun < 300


def test_a_rank_that_fails_is_named_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailed, match=r"^rank 1: out of memory$"):
        run_as(monkeypatch, WAIT, FAIL.format("out of memory"))


def test_what_all_ranks_say_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailed, match=r"^data\.train: no such file$"):
        run_as(monkeypatch, *[FAIL.format("data.train: no such file")] * 2)


def test_a_signal_to_one_rank_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        run_as(monkeypatch, STOP, "raise SystemExit(143)")
    with pytest.raises(Interrupted):  # before it could handle it
        run_as(monkeypatch, STOP, "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_is_passed_on(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    with pytest.raises(Interrupted) as end:
        run_as(monkeypatch, STOP, STOP)
    assert (end.value.code, end.value.signal) == (143, number)


@pytest.mark.parametrize(
    ("words", "environment", "count"),
    [
        (["trainer.devices=2"], {}, 0),
        (["strategy=ddp", "trainer.devices=2"], {}, 2),
        (["strategy=ddp", "trainer.devices=auto", "trainer.accelerator=cpu"], {}, 1),
        (["strategy=ddp", "trainer.accelerator=cpu"], {}, 1),
        (["strategy=ddp", "trainer.devices=2"], {"LOCAL_RANK": "0"}, 0),
        (["strategy=ddp", "trainer.devices=2"], {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train"}, 0),
        (["strategy=ddp", "trainer.devices=2"], {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash"}, 2),
    ],
)
def test_ranks_are_started_where_nobody_else_has(
    words: list[str], environment: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.ranks_to_start(compose(*words)) == count


def test_ranks_import_this_package_whatever_the_users_folder_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr("halos.processes.launch.subprocess.Popen", lambda command, env: started.append((command, env)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    launch._start(tmp_path / "config.yaml", 1, 2, 29500)
    ((command, environment),) = started
    assert "-P" in command
    first, second = environment["PYTHONPATH"].split(os.pathsep)
    assert (Path(first) / "halos" / "cli.py").is_file()
    assert second == str(tmp_path)
    assert (environment["RANK"], environment["LOCAL_RANK"]) == ("1", "1")
