"""Value functions of losses, drawn as in figure 2 of the KTO paper (arXiv 2402.01306)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from halos.testing.examples import Make
from halos.theory.values import Side, sides, value_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEAR, SHOWN, OUTLYING = 0.1, 30.0, 300.0
"""Values that exceed those of the nearest tenth of the gains OUTLYING times are cut off at SHOWN times those."""
COLOURS = {Side.DESIRABLE: "tab:green", Side.UNDESIRABLE: "tab:red"}


def plot_values(
    makes: Mapping[str, Make],
    file: Path,
    *,
    reach: float = 50.0,
    points: int = 201,
    columns: int | None = None,
    panel: tuple[float, float] = (3.2, 3.0),
) -> None:
    """Draw each loss's value of a completion over its log-ratio less the reference point, in nats.

    Each loss has a panel with a vertical axis of its own, as values of different losses have different units.

    Args:
        makes: constructors of the losses, by the titles of their panels.
        file: the picture to write.
        reach: the largest gain and loss, in nats.
        points: the number of gains, evenly spaced.
        columns: panels in a row; None: all.
        panel: width and height of a panel, in inches.
    """
    # Slow to import. A Figure without pyplot needs no display and no global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    gains = torch.linspace(-reach, reach, points, dtype=torch.float64).tolist()
    columns = columns or len(makes)
    rows = -(-len(makes) // columns)
    with rc_context({"font.size": min(10.0, 4 * panel[0])}):
        figure = Figure(figsize=(panel[0] * columns, panel[1] * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for (name, make), axes in zip(makes.items(), grid, strict=False):
            axes.set_title(name)
            curves = {side: value_curve(make, side, gains) for side in sides(make(None))}
            _draw(axes, gains, curves)
        for axes in list(grid):
            axes.remove()
        figure.supxlabel("log-ratio − reference point (nats)", fontsize="medium")
        figure.axes[0].set_ylabel("value")
        _legend(figure)
        figure.savefig(file, dpi=120)


def _draw(axes: Axes, gains: list[float], curves: Mapping[Side, list[float]]) -> None:
    for side, curve in curves.items():
        axes.plot(gains, curve, color=COLOURS[side], label=side.name.lower())
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.axhline(0, color="grey", linewidth=0.5)
    values = torch.tensor([*curves.values()])
    inner = float(values[:, torch.tensor(gains).abs() <= NEAR * gains[-1]].abs().max())
    if float(values.abs().max()) > OUTLYING * inner:
        # An exponential would leave nothing to see of the rest.
        axes.set_ylim(-SHOWN * inner, SHOWN * inner)


def _legend(figure: Figure) -> None:
    # Outside of the panels: in every corner of some panel there is a curve.
    labels = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels.keys(), loc="outside upper right", ncols=len(labels), frameon=False)
