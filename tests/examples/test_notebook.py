"""The notebook of the examples runs offline, and each of its losses moves the rewards apart."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "swap_the_loss.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.long
def test_three_losses_move_the_rewards_apart(
    notebook: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel is another process: it inherits the environment, in which the hub is switched off.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("HALOS_CACHE", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    results = "[margins, [[*curve['train/log_ratio/chosen'].dropna()] for curve in curves.values()]]"
    notebook.cells.append(new_code_cell(f"import json\nprint(json.dumps({results}))"))
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()

    *cells, last = code_cells(notebook)
    margins, log_ratios = json.loads(last.outputs[0].text)
    assert list(margins) == ["KTO", "DPO", "Anchored"]
    assert all(margin > 0.02 for margin in margins.values()), margins
    for curve in log_ratios:
        assert len(curve) == 40
        assert curve[0] == pytest.approx(0, abs=1e-4)
        assert curve[-1] != pytest.approx(0, abs=1e-4)
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1


def test_outputs_are_cleared_before_a_commit(notebook: nbformat.NotebookNode) -> None:
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
