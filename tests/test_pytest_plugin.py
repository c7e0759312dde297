"""``pytest --halos-objective``, in a folder that knows nothing of this repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import halos

MINE = """
import torch
from halos.objectives import Objective, Output

class Hinge(Objective):
    view = "pairs"

    def compute(self, batch, policy, reference):
        rewards = policy.sum - reference.sum
        losses = torch.relu(1 - (rewards[:, 0] - rewards[:, 1]))
        return Output(loss={"hinge": self.per_example(losses, batch)}, rewards=rewards)

class Reversed(Hinge):
    def compute(self, batch, policy, reference):
        return super().compute(batch, reference, policy)

NoObjective = 3
"""


def pytest_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "mylab").mkdir()
    (folder / "mylab" / "losses.py").write_text(MINE)
    environment = {**os.environ, "PYTHONPATH": str(Path(halos.__file__).parent.parent)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_an_objective_from_elsewhere_is_checked_property_by_property(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("def test_mine(): assert False\n")
    done = pytest_run(tmp_path, "--halos-objective", "mylab.losses.Hinge")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_conformance[row order-mylab.losses.Hinge] PASSED" in done.stdout
    assert "test_mine" not in done.stdout


@pytest.mark.long
def test_a_broken_one_fails_where_it_is_broken_beside_own_tests(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("def test_mine(): pass\n")
    done = pytest_run(tmp_path, "test_mine.py", "--halos-objective", "mylab.losses.Reversed")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_mine.py::test_mine PASSED" in done.stdout
    assert "Reversed, signs: log π of desirable completions: expected a push above 0, found" in done.stdout
    assert "test_conformance[padding-mylab.losses.Reversed] PASSED" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nope.X", "No module named 'nope'; nope was looked for in {folder}, in PYTHONPATH and among"),
        ("mylab.losses.Hing", "module 'mylab.losses' has no attribute 'Hing'"),
        ("mylab.losses.NoObjective", "expected a subclass of halos.objectives.Objective"),
    ],
)
def test_one_mistake_is_one_error(path: str, said: str, tmp_path: Path) -> None:
    done = pytest_run(tmp_path, "--halos-objective", path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"--halos-objective {path}: {said.format(folder=tmp_path)}" in done.stdout
    assert "1 error in" in done.stdout
    assert "failed" not in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.long
def test_without_the_option_nothing_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("import sys\ndef test_mine(): assert 'torch' not in sys.modules\n")
    done = pytest_run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
