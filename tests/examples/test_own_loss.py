"""The package of a loss of one's own: its tests, the kit, and a run, with nothing but the folder on Python's path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train_runs import QUICK

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "own_loss"


def python(*words: str, folder: Path = PACKAGE) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": f"{ROOT}:{PACKAGE}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=os.environ | paths, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_its_tests_and_the_kit_pass() -> None:
    done = python("-m", "pytest", "-p", "no:cacheprovider", "-rs", "tests", "--halos-objective", "focal.Focal")
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(skipped) == 1
    assert skipped[0].endswith("takes no margins")


@pytest.mark.slow
def test_the_command_trains_with_its_configuration(tmp_path: Path) -> None:
    words = ["--config-dir", str(PACKAGE / "conf"), "loss=focal", "loss.gamma=1.5", f"output_dir={tmp_path / 'out'}"]
    command = "from halos.cli import main; main()"
    done = python("-c", command, "train", *words, *QUICK, "trainer.max_steps=2", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["loss"] == "focal"
    # −(1 − 1/2)^γ log 1/2 where the policy is its reference.
    assert summary["train_loss"][0] == pytest.approx(0.5**1.5 * 0.6931471805599453, rel=1e-3)
