"""The figure of a claim: its metric over what was varied, with intervals over seeds."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import Any

from halos.comparison.claims import Verdict
from halos.comparison.figures import line_colour, new_figure
from halos.evaluation.statistics import Estimate

Points = list[tuple[Any, Estimate]]


def claim_figure(verdict: Verdict) -> tuple[Any, Any]:
    """(figure, axes): the claim's metric over its ``x``, a line for each of its ``lines``: means over seeds with
    Student's 95 % intervals; dotted, what the reference reaches."""
    claim = verdict.claim
    lines = _lines(verdict)
    places = [x for points in lines.values() for x, _ in points]
    numeric = all(isinstance(x, float | int) and not isinstance(x, bool) for x in places)
    words = list(dict.fromkeys(map(_word, places)))
    figure, axes = new_figure(5.6, 3.6)
    for n, (name, points) in enumerate(lines.items()):
        drawn = sorted(points, key=lambda point: point[0]) if numeric else points
        at = [x if numeric else words.index(_word(x)) for x, _ in drawn]
        style = {"fmt": "o-" if numeric else "o", "capsize": 3, "color": line_colour(n), "label": name or None}
        axes.errorbar(at, [y.value for _, y in drawn], yerr=_reach(drawn), **style)
    if not numeric:
        axes.set_xticks(range(len(words)), words)
        axes.set_xlim(-0.5, len(words) - 0.5)
    elif claim.figure.log:
        axes.set_xscale("log")
    before = [run.numbers.get(claim.metric.replace("policy_", "reference_")) for run in verdict.runs]
    if "policy_" in claim.metric and (known := [value for value in before if value is not None]):
        axes.axhline(fmean(known), color="grey", linestyle=":", linewidth=1.2, label="reference")
    axes.set(xlabel=claim.figure.label, ylabel=claim.measure)
    axes.legend(fontsize=8, frameon=False)
    return figure, axes


def _lines(verdict: Verdict) -> dict[str, Points]:
    spec = verdict.claim.figure
    lines: dict[str, Points] = defaultdict(list)
    for group in verdict.groups:
        config = group.runs[0].config
        x, y = group.over_seeds(spec.x), group.over_seeds(verdict.claim.metric)
        if y is not None:
            lines[", ".join(_word(config.get(key)) for key in spec.lines)].append((x.value if x else config[spec.x], y))
    return lines


def _reach(points: Points) -> list[list[float]]:
    # Below and above each value.
    return [
        [0.0 if y.low is None else y.value - y.low for _, y in points],
        [0.0 if y.high is None else y.high - y.value for _, y in points],
    ]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool | None) else str(value)
