"""The notebooks of the examples run offline, and show what they promise."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(name: str, results: str, folder: Path, patch: pytest.MonkeyPatch) -> tuple[nbformat.NotebookNode, list]:
    """The notebook after it has run in this folder, and what an expression is at its end."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    # The kernel is another process: it inherits the environment, in which the hub is switched off.
    patch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for variable in ("HALOS_CACHE", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        patch.setenv(variable, str(folder / variable.lower()))
    notebook.cells.append(new_code_cell(f"import json\nprint(json.dumps({results}))"))
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook, json.loads(notebook.cells.pop().outputs[0].text)


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.long
def test_three_losses_move_the_rewards_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = "[margins, [[*curve['train/log_ratio/chosen'].dropna()] for curve in curves.values()]]"
    notebook, (margins, log_ratios) = run("swap_the_loss.ipynb", results, tmp_path, monkeypatch)
    assert list(margins) == ["KTO", "DPO", "Anchored"]
    assert all(margin > 0.02 for margin in margins.values()), margins
    for curve in log_ratios:
        assert len(curve) == 40
        assert curve[0] == pytest.approx(0, abs=1e-4)
        assert curve[-1] != pytest.approx(0, abs=1e-4)
    assert pictures(notebook) == 1


@pytest.mark.slow
def test_a_file_of_pairs_becomes_two_aligned_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(EXAMPLES / "library_desk.jsonl", tmp_path)
    names = ("val/rewards/margins", "val/kl")
    results = f"[[[[*curve[name].dropna()] for name in {names}] for curve in curves.values()], replies]"
    notebook, (curves, replies) = run("your_data.ipynb", results, tmp_path, monkeypatch)
    for margins, kl in curves:
        assert len(margins) == len(kl) == 9
        assert margins[0] == pytest.approx(0, abs=1e-4)
        assert margins[-1] > 0.5
        assert kl[0] == pytest.approx(0, abs=1e-4)
        assert min(kl[1:]) > 0.01
    assert set(replies) == {"sft", "kto", "dpo"}
    assert all(replies.values())
    report = "".join(output.text for output in code_cells(notebook)[1].outputs)
    assert all(word in report for word in ("records", "40", "desirable"))
    assert pictures(notebook) == 1


def test_the_rows_are_questions_with_two_replies() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "library_desk.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 40
    assert all([*row] == ["prompt", "chosen", "rejected"] and len({*row.values()}) == 3 for row in rows)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared_before_a_commit(path: Path) -> None:
    cells = code_cells(nbformat.read(path, as_version=4))
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
