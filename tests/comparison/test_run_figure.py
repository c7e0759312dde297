"""The picture of one run: its curves are those of metrics.csv."""

from pathlib import Path

import pytest
from matplotlib.container import ErrorbarContainer

from halos.comparison.run_figure import run_figure
from scripts.plot_run import draw
from tests.commands.test_compare import run as comparable_run

ROWS = [
    {"step": 0.0, "val/kl": 0.0, "val/kl_error": 0.0},
    {"step": 1.0, "train/rewards/chosen": 0.5, "train/rewards/rejected": -0.25, "train/z0": 0.125},
    {"step": 2.0, "train/rewards/chosen": 0.75, "train/rewards/rejected": -0.5, "val/kl": 2.0, "val/kl_error": 0.5},
]


def test_curves_are_those_of_the_rows() -> None:
    left, right = run_figure(ROWS).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in left.get_lines()}
    assert drawn["desirable"] == [[1, 0.5], [2, 0.75]]
    assert drawn["undesirable"] == [[1, -0.25], [2, -0.5]]
    assert "margin" not in drawn
    (bars,) = right.containers
    assert isinstance(bars, ErrorbarContainer)
    assert bars.lines[0].get_xydata().tolist() == [[0, 0], [2, 2]]
    assert [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()][1] == [2 - 0.98, 2 + 0.98]


def test_a_run_without_rewards_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metrics.csv: expected rewards"):
        run_figure([{"step": 1.0, "train/loss": 0.5}])


def test_the_command_writes_what_the_name_says(tmp_path: Path) -> None:
    comparable_run(tmp_path / "run", "kto", 0, 0.5)
    (tmp_path / "run" / "metrics.csv").write_text("step,train/rewards/chosen,val/kl\n1,0.5,\n2,,0.25\n")
    for name, start in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        draw(str(tmp_path / "run"), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(ValueError, match=r"^output: expected a file that ends in"):
        draw(str(tmp_path / "run"), tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="no such folder"):
        draw(str(tmp_path / "none"), tmp_path / "a.png")
