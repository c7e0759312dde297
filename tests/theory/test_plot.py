"""The picture has a panel for each loss and a line for each side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from halos.objectives import DPO, KTO
from halos.theory import Side, value_curve
from halos.theory.plot import plot_values


def test_panels_and_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    save = Figure.savefig

    def noted(figure: Figure, *args: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", noted)
    plot_values({"kto": KTO, "dpo": DPO}, tmp_path / "values.png", reach=10.0, points=3)
    assert (tmp_path / "values.png").read_bytes().startswith(b"\x89PNG")
    kto, dpo = drawn[0].axes
    assert [axes.get_title() for axes in (kto, dpo)] == ["kto", "dpo"]
    lines = {line.get_label(): line for line in kto.get_lines()}
    assert list(lines["undesirable"].get_ydata()) == value_curve(KTO, Side.UNDESIRABLE, [-10.0, 0.0, 10.0])
    assert dpo.get_lines()[0].get_label() == "desirable"
    assert "undesirable" not in [line.get_label() for line in dpo.get_lines()]
