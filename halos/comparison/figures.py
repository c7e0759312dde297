"""The figures of a comparison, as SVG text: frontier, learning curves, reward distributions."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from halos.comparison.runs import Group

REWARDS = ("samples/policy_reward", "evaluation/judge/score_policy", "evaluation/judge/win_rate")
KLS = ("samples/kl", "evaluation/samples/kl_per_completion")
CURVES = {
    "val/loss": "loss",
    "val/rewards/margins": "reward margin",
    "val/rewards/accuracies": "reward accuracy",
    "val/rewards/auc": "reward AUC",
    "val/kl/policy_reference": "log-ratio on the data, nats",
}
MOST_DISTRIBUTIONS = 12


def frontier(groups: Sequence[Group]) -> str | None:
    """Reward against KL: a faint point for each seed, a strong one for their mean; None where there is no such pair."""
    have = Counter(
        (x, y) for group in groups for run in group.runs for x in KLS for y in REWARDS if {x, y} <= run.numbers.keys()
    )
    if not have:
        return None
    pair = max(have, key=lambda names: have[names])  # the one that most runs have
    figure, axes = new_figure(6.4, 4.2)
    for n, group in enumerate(groups):
        points = [[run.numbers[m] for m in pair] for run in group.runs if set(pair) <= run.numbers.keys()]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=14, alpha=0.35, color=line_colour(n), linewidths=0)
            axes.scatter([fmean(x)], [fmean(y)], s=60, color=line_colour(n), marker=_marker(n), label=group.label)
    axes.set(xlabel=f"KL(policy ‖ reference), nats per completion ({pair[0]})", ylabel=pair[1])
    return as_svg(figure, axes)


def curves(groups: Sequence[Group]) -> dict[str, str]:
    """Learning curves on validation data: means over seeds, with one standard deviation as a band."""
    figures = {}
    for metric, name in CURVES.items():
        lines = [(n, group, _curve(group, metric)) for n, group in enumerate(groups)]
        if not any(points for _, _, points in lines):
            continue
        figure, axes = new_figure(5.2, 3.4)
        for n, group, points in lines:
            if points:
                steps = sorted(points)
                middle = [fmean(points[step]) for step in steps]
                spread = [stdev(points[step]) if len(points[step]) > 1 else 0.0 for step in steps]
                axes.plot(steps, middle, color=line_colour(n), label=group.label, linewidth=1.6)
                low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
                axes.fill_between(steps, low, high, color=line_colour(n), alpha=0.18, linewidth=0)
        axes.set(xlabel="optimizer step", ylabel=name)
        figures[name] = as_svg(figure, axes)
    return figures


def distributions(groups: Sequence[Group]) -> dict[str, str]:
    """Implied rewards of desirable and undesirable held-out completions, over all seeds of a group."""
    figures = {}
    for group in [group for group in groups if any(run.rewards for run in group.runs)][:MOST_DISTRIBUTIONS]:
        sides: dict[bool, list[float]] = defaultdict(list)
        for row in (row for run in group.runs for row in run.rewards):
            sides[row["desirable"]].append(row["reward"])
        figure, axes = new_figure(3.6, 2.5)
        both = [value for values in sides.values() for value in values]
        span = (min(both), max(both)) if min(both) < max(both) else (min(both) - 0.5, max(both) + 0.5)
        for desirable, colour, name in ((True, "tab:green", "desirable"), (False, "tab:red", "undesirable")):
            if sides[desirable]:
                axes.hist(sides[desirable], bins=40, range=span, density=True, alpha=0.55, color=colour, label=name)
        axes.set(xlabel="reward", ylabel="density")
        figures[group.label] = as_svg(figure, axes)
    return figures


def _curve(group: Group, metric: str) -> dict[float, list[float]]:
    points: dict[float, list[float]] = defaultdict(list)
    for run in group.runs:
        # The last value of a step: one that was validated twice, before and after a resume, counts once.
        for step, value in {row["step"]: row[metric] for row in run.curves if metric in row}.items():
            points[step].append(value)
    return points


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches and its axes."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def as_svg(figure: Any, axes: Any) -> str:
    """The figure with its legend; the same runs give the same text."""
    from matplotlib import rc_context

    entries = len(axes.get_legend_handles_labels()[1])
    axes.legend(fontsize=7, frameon=False, ncols=2 if entries > 8 else 1)
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "halos"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def line_colour(n: int) -> Any:
    """The colour of line ``n``."""
    from matplotlib import colormaps

    return colormaps["tab10" if n < 10 else "tab20b"](n % 10 if n < 10 else n % 20)


def _marker(n: int) -> str:
    return "os^DvPX*<>"[n // 10 % 10] if n >= 10 else "o"
