"""A comparison as a table: on the terminal, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from halos.comparison.runs import Group, paired_difference
from halos.evaluation.statistics import Estimate
from halos.safe_text import csv_cell, markdown as markdown_line, visible

DEFAULT_METRICS = (
    "samples/policy_desirable", "samples/policy_reward", "samples/kl", "evaluation/judge/win_rate",
    "evaluation/rewards/accuracies", "evaluation/rewards/auc", "val/kl", "val/rewards/accuracies", "val/rewards/auc",
    "val/rewards/margins", "evaluation/rewards/ece", "run/train_seconds", "val/loss",
)  # fmt: skip
"""Metrics that are compared where the user names none: the first MAX_COLUMNS that there are.

``val/kl`` gives way to the KL of the samples at the end, which are more. Losses of different kinds have no common unit,
so ``val/loss`` comes last.
"""
MAX_COLUMNS = 5
DIFFERENCE = "Δ "
"""What the name of a metric starts with in the column of its differences to the baseline."""
_LATEX = {
    "\\": r"\textbackslash{}", **{c: "\\" + c for c in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\^{}",
    "[": "{[}", "*": "{*}", "±": r"$\pm$", "–": "--", "Δ": r"$\Delta$",
}  # fmt: skip
"""What LaTeX reads for a character that it would not print; after the end of a row it takes [ and * for options."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Estimates over seeds.

    Attributes:
        labels: the label of each row's group.
        metrics: the metric of each column.
        cells: ``cells[row][column]``, None where the group lacks the metric.
    """

    labels: list[str]
    metrics: list[str]
    cells: list[list[Estimate | None]]


def compare_groups(groups: Sequence[Group], metrics: Sequence[str] | None, baseline: str | None) -> Comparison:
    """Compare groups of runs.

    Args:
        groups: one for each row.
        metrics: the metrics to compare; None for the default ones.
        baseline: the label of a group. Each metric gets a second column with the other groups' differences to it,
            paired by seed.

    Raises:
        ValueError: no run has one of the metrics, or no group has the label of the baseline.
    """
    available = {name for group in groups for run in group.runs for name in run.numbers}
    if missing := [name for name in metrics or () if name not in available]:
        raise ValueError(f"metrics: expected some of {', '.join(sorted(available))}; found {missing[0]!r}")
    offered = available - {"val/kl"} if "samples/kl" in available else available
    defaults = [n for name in DEFAULT_METRICS for n in sorted(offered) if n == name or n.startswith(f"{name} against ")]
    columns = list(metrics or defaults[:MAX_COLUMNS])
    cells = [[group.over_seeds(name) for name in columns] for group in groups]
    if baseline is not None:
        base = next((group for group in groups if group.label == baseline), None)
        if base is None:
            raise ValueError(f"baseline: expected one of {'; '.join(g.label for g in groups)}; found {baseline!r}")
        others = [
            [None if group is base else paired_difference(group.by_seed(name), base.by_seed(name)) for name in columns]
            for group in groups
        ]
        # A metric that the baseline lacks has no differences.
        known = [place for place in range(len(columns)) if any(row[place] is not None for row in others)]
        for row, differences in zip(cells, others, strict=True):
            row += [differences[place] for place in known]
        columns += [DIFFERENCE + columns[place] for place in known]
    return Comparison([group.label for group in groups], columns, cells)


def cell_text(cell: Estimate | None) -> str:
    """``0.953 ± 0.012``: the mean and half of its 95 % interval; the mean alone for one seed."""
    if cell is None:
        return "–"
    # Student's interval is symmetric, so one number says all of it; a single seed has none.
    return _digits(cell.value) + ("" if cell.half_width is None else f" ± {_digits(cell.half_width)}")


def header(comparison: Comparison) -> list[str]:
    """The names of the columns."""
    return ["run", "seeds", *comparison.metrics]


def rows(comparison: Comparison) -> list[list[str]]:
    """The texts of the cells: for each group its label, its number of seeds, and its metrics."""
    seeds = [max((cell.n for cell in row if cell is not None), default=0) for row in comparison.cells]
    return [
        [label, str(count), *map(cell_text, row)]
        for label, count, row in zip(comparison.labels, seeds, comparison.cells, strict=True)
    ]


def _digits(value: float) -> str:
    # Rewards and rates need decimals, seconds and counts do not.
    return f"{value:z.3f}" if abs(value) < 100 else f"{value:.0f}"


def terminal(comparison: Comparison, console: Console) -> list[RichTable]:
    """Lay the table out for a console: as several tables of the same rows if one would be wider than a line.

    The differences to a baseline then start a table of their own. Every name and number stays whole, except labels
    with a part that is longer than a third of the line.
    """
    columns = list(zip(header(comparison), *rows(comparison), strict=True))
    shared, metrics = columns[:2], columns[2:]

    def fits(block: Sequence[Sequence[str]]) -> bool:
        # The width that the table would take, up to two lines: measured for one line, every table fits.
        options = console.options.update(width=2 * console.width)
        return console.measure(_rich_table([*shared, *block], console.width), options=options).maximum <= console.width

    if fits(metrics):
        return [_rich_table(columns, console.width)]
    blocks = [metrics[:1]]
    for before, column in pairwise(metrics):
        differences_start = column[0].startswith(DIFFERENCE) and not before[0].startswith(DIFFERENCE)
        if differences_start or not fits([*blocks[-1], column]):
            blocks.append([])
        blocks[-1].append(column)
    return [_rich_table([*shared, *block], console.width) for block in blocks]


def _rich_table(columns: Sequence[Sequence[str]], width: int) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD)
    for name, *_ in columns:
        # Names are long; broken at their separators they leave room for more columns.
        table.add_column(name.replace("/", "\n").replace("_", "\n"), max_width=width // 3, overflow="fold")
    for label, *cells in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(label.replace(", ", ",\n"), *cells)
    return table


def as_csv(comparison: Comparison) -> str:
    """The table as CSV, with mean, interval and number of seeds of each metric in columns of their own."""
    fields = ("mean", "low", "high", "seeds")
    out = io.StringIO()
    # The csv module ends lines with \r\n by default.
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", *(csv_cell(f"{metric} {name}") for metric in comparison.metrics for name in fields)])
    for label, cells in zip(comparison.labels, comparison.cells, strict=True):
        values = [(None, None, None, 0) if c is None else (c.value, c.low, c.high, c.n) for c in cells]
        writer.writerow([csv_cell(label), *("" if value is None else value for cell in values for value in cell)])
    return out.getvalue()


def markdown(comparison: Comparison) -> str:
    """The table in GitHub's Markdown."""
    names = header(comparison)
    lines = [names, ["---"] * len(names), *rows(comparison)]
    return "".join(f"| {' | '.join(map(markdown_line, line))} |\n" for line in lines)


def latex(comparison: Comparison) -> str:
    """The table as a booktabs tabular."""
    names = header(comparison)

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(_LATEX.get(c, c) for c in visible(cell, one_line=True)) for cell in cells) + r" \\"

    start = [rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}", r"\toprule", line(names), r"\midrule"]
    return "\n".join([*start, *map(line, rows(comparison)), r"\bottomrule", r"\end{tabular}", ""])
