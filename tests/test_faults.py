"""A few kills of the long campaign that scripts/faults.py is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_killed_runs_resume_to_the_bit() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "faults.py"), "--count", "3", "--seed", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 signals (SIGKILL)" in done.stdout
    assert "0 wrong" in done.stdout
