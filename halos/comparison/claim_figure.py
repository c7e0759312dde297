"""Draws the figure of a claim: its metric over the setting that was varied, with intervals over seeds."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import TYPE_CHECKING, cast

from halos.comparison.claims import Verdict
from halos.comparison.figures import line_colour, new_figure
from halos.evaluation.statistics import Estimate
from halos.safe_text import mathtext

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[object, Estimate]
"""A value of the varied setting, and the metric there."""


def claim_figure(verdict: Verdict) -> tuple[Figure, Axes]:
    """Draw the claim's metric over its ``x``: one line for each combination of its ``lines`` keys.

    Points are means over seeds with Student's 95 % intervals. A dotted line shows what the reference reaches.
    """
    claim = verdict.claim
    lines = _lines(verdict)
    xs = [x for points in lines.values() for x, _ in points]
    numeric = all(_is_number(x) for x in xs)
    names = list(dict.fromkeys(map(_text, xs)))  # of a setting that is no number, in order of first appearance
    figure, axes = new_figure(5.6, 3.6)
    for n, (label, points) in enumerate(lines.items()):
        placed = [(cast(float, x) if numeric else names.index(_text(x)), y) for x, y in points]
        if numeric:
            placed.sort(key=lambda point: point[0])
        x, values = [x for x, _ in placed], [y.value for _, y in placed]
        widths = [_half_width(y) for _, y in placed]
        style = "o-" if numeric else "o"
        shown = mathtext(label) or None
        axes.errorbar(x, values, yerr=widths, fmt=style, capsize=3, color=line_colour(n), label=shown)
    if not numeric:
        axes.set_xticks(range(len(names)), list(map(mathtext, names)))
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif claim.figure.log:
        axes.set_xscale("log")
    # Only metrics of samples are measured on the reference too.
    name = claim.metric.replace("policy_", "reference_")
    reference = [run.numbers[name] for run in verdict.runs if name in run.numbers]
    if name != claim.metric and reference:
        axes.axhline(fmean(reference), color="grey", linestyle=":", linewidth=1.2, label="reference")
    axes.set(xlabel=mathtext(claim.figure.label), ylabel=mathtext(claim.measure))
    axes.legend(fontsize=8, frameon=False)
    return figure, axes


def _lines(verdict: Verdict) -> dict[str, list[Point]]:
    """The points of each line by its label; groups without the metric have none."""
    spec = verdict.claim.figure
    lines: dict[str, list[Point]] = defaultdict(list)
    for group in verdict.groups:
        config = group.runs[0].config
        x, y = group.over_seeds(spec.x), group.over_seeds(verdict.claim.metric)
        if y is not None:
            label = ", ".join(_text(config.get(key)) for key in spec.lines)
            # ``x`` names a metric or a configuration key.
            lines[label].append((x.value if x else config[spec.x], y))
    return lines


def _half_width(estimate: Estimate) -> float:
    # Student's interval is symmetric. A single seed has none.
    return 0.0 if estimate.high is None else estimate.high - estimate.value


def _is_number(value: object) -> bool:
    # A bool is an int for Python, but true and false are names on an axis, not 1 and 0.
    return isinstance(value, float | int) and not isinstance(value, bool)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool | None) else str(value)
