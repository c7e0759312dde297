"""Draws the figure of a claim: its metric over the setting that was varied, with intervals over seeds."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import TYPE_CHECKING, cast

from halos.checks import is_number
from halos.comparison.claims import Verdict
from halos.comparison.figures import line_colour, new_figure
from halos.comparison.runs import group
from halos.evaluation.statistics import Estimate
from halos.safe_text import mathtext

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[object, Estimate]
"""A value of the varied setting, and the metric there."""
LETTERS = 50
"""Of all names below the axis together; longer ones would run into each other, and are turned."""


def claim_figure(verdict: Verdict) -> tuple[Figure, Axes]:
    """Draw the claim's metric over its ``x``: one line for each combination of its ``lines`` keys.

    Points are means over seeds with Student's 95 % intervals. A dotted line shows what the reference reaches, where
    all runs have the same.
    """
    claim = verdict.claim
    lines = _lines(verdict)
    xs = [x for points in lines.values() for x, _ in points]
    numeric = all(map(is_number, xs))  # true and false are names on an axis
    names = list(dict.fromkeys(map(_text, xs)))  # for a setting that is not a number, in order of first appearance
    figure, axes = new_figure(5.6, 3.6)
    for n, (label, points) in enumerate(lines.items()):
        placed = [(cast(float, x) if numeric else names.index(_text(x)), y) for x, y in points]
        if numeric:
            placed.sort(key=lambda point: point[0])
        x, values = [x for x, _ in placed], [y.value for _, y in placed]
        widths = [y.half_width or 0.0 for _, y in placed]  # a single seed has none
        style = "o-" if numeric else "o"
        shown = mathtext(label) or None
        axes.errorbar(x, values, yerr=widths, fmt=style, capsize=3, color=line_colour(n), label=shown)
    if not numeric:
        axes.set_xticks(range(len(names)), list(map(mathtext, names)))
        if sum(map(len, names)) > LETTERS:
            axes.tick_params("x", labelrotation=20)
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif claim.figure.log:
        axes.set_xscale("log")
    # Only metrics of samples are measured on the reference too.
    name = claim.metric.replace("policy_", "reference_")
    reference = {(run.seed, run.numbers[name]) for run in verdict.runs if name in run.numbers}
    # Runs after SFT have another reference than those without: there is then no one level to draw.
    if name != claim.metric and reference and len(reference) == len({seed for seed, _ in reference}):
        axes.axhline(
            fmean(level for _, level in reference), color="grey", linestyle=":", linewidth=1.2, label="reference"
        )
    axes.set(xlabel=mathtext(claim.figure.label), ylabel=mathtext(claim.measure))
    axes.legend(fontsize=8, frameon=False)
    return figure, axes


def _lines(verdict: Verdict) -> dict[str, list[Point]]:
    """The points of each line by its label; groups without the metric have none."""
    spec = verdict.claim.figure
    lines: dict[str, list[Point]] = defaultdict(list)
    for seeds in group(verdict.runs):
        config = seeds.runs[0].config
        x, y = seeds.over_seeds(spec.x), seeds.over_seeds(verdict.claim.metric)
        if y is not None:
            label = ", ".join(_text(config.get(key)) for key in spec.lines)
            # ``x`` names a metric or a configuration key.
            lines[label].append((x.value if x else config[spec.x], y))
    return lines


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool | None) else str(value)
