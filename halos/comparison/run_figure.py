"""Draws what happened to rewards and to KL in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REWARDS = {
    "train/rewards/chosen": ("desirable", "tab:green"),
    "train/rewards/rejected": ("undesirable", "tab:red"),
    "train/rewards/margins": ("margin", "tab:blue"),
}


def run_figure(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the rewards of training batches next to the KL of validations and KTO's z₀.

    Args:
        rows: the rows of a run's ``metrics.csv``, each with ``step``.

    Raises:
        ValueError: they have no rewards.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = [_line(left, rows, metric, label=name, color=colour) for metric, (name, colour) in REWARDS.items()]
    if not any(drawn):
        raise ValueError("metrics.csv: expected rewards (train/rewards/chosen), found none")
    _line(right, rows, "train/z0", label="z₀ (training)", color="tab:purple")
    measured = [row for row in rows if "val/kl" in row]
    steps, kl = ([row[name] for row in measured] for name in ("step", "val/kl"))
    errors = [1.96 * row.get("val/kl_error", 0.0) for row in measured]
    label = "KL(policy ‖ reference) ± 95 % (validation)"
    right.errorbar(steps, kl, errors, fmt="o-", color="black", capsize=3, linewidth=1.2, markersize=4, label=label)
    left.set(title="implied rewards (training batches)", xlabel="optimizer step")
    right.set(title="KL and KTO's reference point z₀, nats per completion", xlabel="optimizer step")
    for axes in (left, right):
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=8
        )  # covers no curve
    return figure


def _line(axes: Axes, rows: Sequence[Mapping[str, float]], metric: str, *, label: str, color: str) -> bool:
    """Draw a metric over steps where a run has it; return whether it has."""
    points = {row["step"]: row[metric] for row in rows if metric in row}
    if points:
        axes.plot(list(points), list(points.values()), label=label, color=color, linewidth=1.2)
    return bool(points)
