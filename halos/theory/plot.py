"""Value functions of losses, drawn as in figure 2 of the KTO paper (arXiv 2402.01306)."""

from collections.abc import Mapping
from pathlib import Path

import torch

from halos.testing.examples import Make
from halos.theory.values import Side, sides, value_curve

COLOURS = {Side.DESIRABLE: "tab:green", Side.UNDESIRABLE: "tab:red"}


def plot_values(makes: Mapping[str, Make], file: Path, *, reach: float = 50.0, points: int = 201) -> None:
    """Draw each loss's value of a completion over its log-ratio less the reference point, in nats.

    Each loss has a panel with a vertical axis of its own, as values of different losses have different units.
    """
    # Slow to import. A Figure without pyplot needs no display and no global state.
    from matplotlib.figure import Figure

    gains = torch.linspace(-reach, reach, points, dtype=torch.float64).tolist()
    figure = Figure(figsize=(3.2 * len(makes), 3.0), layout="constrained")
    for axes, (name, make) in zip(figure.subplots(1, len(makes), squeeze=False)[0], makes.items(), strict=True):
        for side in sides(make(None)):
            curve = value_curve(make, side, gains)
            axes.plot(gains, curve, color=COLOURS[side], label=side.name.lower())
        axes.axvline(0, color="grey", linewidth=0.5)
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.set(title=name, xlabel="log-ratio − reference point (nats)")
    figure.axes[0].set_ylabel("value")
    # Outside of the panels: in every corner of some panel there is a curve.
    labels = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels.keys(), loc="outside upper right", ncols=len(labels), frameon=False)
    figure.savefig(file, dpi=120)
