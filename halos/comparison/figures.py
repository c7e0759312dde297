"""Draws the figures of a comparison as SVG: reward against KL, learning curves, reward distributions."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from halos.comparison.runs import Group
from halos.safe_text import mathtext

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REWARDS = ("samples/policy_reward", "evaluation/judge/score_policy", "evaluation/judge/win_rate")
KLS = ("samples/kl", "evaluation/samples/kl", "val/kl")
CURVES = {
    "val/loss": "loss",
    "val/rewards/margins": "reward margin",
    "val/rewards/accuracies": "reward accuracy",
    "val/rewards/auc": "reward AUC",
    "val/kl": "KL(policy ‖ reference), nats per completion",
    "val/log_ratio/chosen": "log-ratio of chosen completions, nats",
    "val/log_ratio/rejected": "log-ratio of rejected completions, nats",
}
"""The metrics that have a learning curve, and the names of their axes."""
MAX_DISTRIBUTIONS = 12


def frontier(groups: Sequence[Group]) -> str | None:
    """Draw reward against KL: a faint point for each seed, a strong one for their mean.

    Returns:
        The SVG, with the pair of metrics that most runs have; None if no run has both a reward and a KL.
    """
    available = Counter(
        (x, y) for group in groups for run in group.runs for x in KLS for y in REWARDS if {x, y} <= run.numbers.keys()
    )
    if not available:
        return None
    # All groups use the same pair, the one of most runs; otherwise their points could not be compared.
    kl, reward = max(available, key=lambda pair: available[pair])
    figure, axes = new_figure(6.4, 4.2)
    for n, group in enumerate(groups):
        runs = [run.numbers for run in group.runs if {kl, reward} <= run.numbers.keys()]
        if runs:
            x, y = [run[kl] for run in runs], [run[reward] for run in runs]
            axes.scatter(x, y, s=14, alpha=0.35, color=line_colour(n), linewidths=0)
            axes.scatter(
                [fmean(x)], [fmean(y)], s=60, color=line_colour(n), marker=_marker(n), label=mathtext(group.label)
            )
    axes.set(xlabel=f"KL(policy ‖ reference), nats per completion ({kl})", ylabel=reward)
    return as_svg(figure, axes)


def curves(groups: Sequence[Group]) -> dict[str, str]:
    """Draw learning curves on validation data: means over seeds, with one standard deviation as a band.

    Returns:
        The SVG of each metric that some run has, by the name of its axis.
    """
    figures = {}
    for metric, name in CURVES.items():
        lines = [_curve(group, metric) for group in groups]
        if not any(lines):
            continue
        figure, axes = new_figure(5.2, 3.4)
        for n, (group, points) in enumerate(zip(groups, lines, strict=True)):
            steps = sorted(points)
            means = [fmean(points[step]) for step in steps]
            spreads = [stdev(points[step]) if len(points[step]) > 1 else 0.0 for step in steps]
            if steps:
                axes.plot(steps, means, color=line_colour(n), label=mathtext(group.label), linewidth=1.6)
                low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
                axes.fill_between(steps, low, high, color=line_colour(n), alpha=0.18, linewidth=0)
        axes.set(xlabel="optimizer step", ylabel=name)
        figures[name] = as_svg(figure, axes)
    return figures


def distributions(groups: Sequence[Group]) -> dict[str, str]:
    """Draw implied rewards of desirable and undesirable held-out completions, over all seeds of a group.

    Returns:
        The SVG of each of the first MAX_DISTRIBUTIONS groups that have rewards, by label.
    """
    figures = {}
    for group in [group for group in groups if any(run.rewards for run in group.runs)][:MAX_DISTRIBUTIONS]:
        rows = [row for run in group.runs for row in run.rewards]
        rewards = [row["reward"] for row in rows]
        low, high = min(rewards), max(rewards)
        # Both histograms share one range, so that their bins line up. A range of no width has no bins.
        span = (low, high) if low < high else (low - 0.5, high + 0.5)
        figure, axes = new_figure(3.6, 2.5)
        for desirable, colour, name in ((True, "tab:green", "desirable"), (False, "tab:red", "undesirable")):
            values = [row["reward"] for row in rows if row["desirable"] == desirable]
            if values:
                axes.hist(values, bins=40, range=span, density=True, alpha=0.55, color=colour, label=name)
        axes.set(xlabel="reward", ylabel="density")
        figures[group.label] = as_svg(figure, axes)
    return figures


def _curve(group: Group, metric: str) -> dict[float, list[float]]:
    """The metric's value in each run that has it, by step."""
    points: dict[float, list[float]] = defaultdict(list)
    for run in group.runs:
        # A run that was resumed may have validated a step twice. The dict keeps the last value, so it counts once.
        for step, value in {row["step"]: row[metric] for row in run.curves if metric in row}.items():
            points[step].append(value)
    return points


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure, its size in inches, and its axes."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def as_svg(figure: Figure, axes: Axes) -> str:
    """Add a legend and render the figure as an ``<svg>`` element; equal figures give equal texts."""
    from matplotlib import rc_context

    labels = axes.get_legend_handles_labels()[1]
    below = len(labels) > 8 or max(map(len, labels), default=0) > 40
    # A large legend would cover the curves, or leave no room for them: it stands below, and makes the figure longer.
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18)} if below else {}
    legend = axes.legend(fontsize=7, frameon=False, **place)
    legend.set_in_layout(not below)
    out = io.StringIO()
    # Without a fixed salt and date, each rendering would have other ids and another time in it.
    with rc_context({"svg.hashsalt": "halos"}):
        tight: dict[str, Any] = {"bbox_inches": "tight", "bbox_extra_artists": [legend]} if below else {}
        figure.savefig(out, format="svg", metadata={"Date": None}, **tight)
    return out.getvalue()[out.getvalue().index("<svg") :]


def line_colour(n: int) -> tuple[float, float, float, float]:
    """The colour of line ``n``, as red, green, blue and opacity."""
    from matplotlib import colormaps

    return colormaps["tab10" if n < 10 else "tab20b"](n % 10 if n < 10 else n % 20)


def _marker(n: int) -> str:
    # Colours repeat after a while: each ten lines have another marker.
    return "os^DvPX*<>"[n // 10 % 10] if n >= 10 else "o"
