"""A comparison as a table: on the terminal, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from halos.comparison.runs import Group
from halos.evaluation.statistics import Estimate, over_seeds

PREFERRED = (
    "samples/policy_desirable", "samples/policy_reward", "samples/kl", "evaluation/judge/win_rate",
    "evaluation/rewards/accuracies", "evaluation/rewards/auc", "evaluation/rewards/ece", "val/rewards/accuracies",
    "val/rewards/auc", "val/rewards/margins", "val/loss", "run/train_seconds",
)  # fmt: skip
MOST_COLUMNS = 5
_LATEX = {"\\": r"\textbackslash{}", **{c: "\\" + c for c in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\^{}"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Estimates over seeds: ``cells[row][column]``, None where a group lacks the metric."""

    labels: list[str]
    metrics: list[str]
    cells: list[list[Estimate | None]]


def compare_groups(groups: Sequence[Group], metrics: Sequence[str] | None, baseline: str | None) -> Comparison:
    """The metrics asked for (or the first well-known ones that there are), and with ``baseline`` their differences to
    that group, paired by seed.

    Raises ``ValueError`` for a metric or a baseline that no run has.
    """
    known = {name for group in groups for run in group.runs for name in run.numbers}
    if missing := [name for name in metrics or () if name not in known]:
        raise ValueError(f"metrics: expected some of {', '.join(sorted(known))}; found {missing[0]!r}")
    preferred = [n for name in PREFERRED for n in sorted(known) if n == name or n.startswith(f"{name} against ")]
    chosen = list(metrics or preferred[:MOST_COLUMNS])
    cells = [[group.over_seeds(name) for name in chosen] for group in groups]
    if baseline is not None:
        base = next((group for group in groups if group.label == baseline), None)
        if base is None:
            raise ValueError(f"baseline: expected one of {'; '.join(g.label for g in groups)}; found {baseline!r}")
        for group, row in zip(groups, cells, strict=True):
            row += [None if group is base else difference(group, base, name) for name in chosen]
        chosen += [f"Δ {name}" for name in chosen]
    return Comparison([group.label for group in groups], chosen, cells)


def difference(group: Group, base: Group, metric: str) -> Estimate | None:
    """The mean difference over the seeds that both have, with Student's t interval of the paired differences."""
    theirs = {run.seed: run.numbers[metric] for run in base.runs if metric in run.numbers}
    both = [run for run in group.runs if metric in run.numbers and run.seed in theirs]
    found = [run.numbers[metric] - theirs[run.seed] for run in both]
    return over_seeds(found) if found else None


def shown(cell: Estimate | None) -> str:
    """``0.953 ± 0.012``: the mean and half of its 95 % interval; the mean alone for one seed."""
    if cell is None:
        return "–"
    reach = "" if cell.high is None else f" ± {_digits(cell.high - cell.value)}"
    return f"{_digits(cell.value)}{reach}"


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def _seeds(comparison: Comparison, row: int) -> str:
    return str(max((cell.n for cell in comparison.cells[row] if cell is not None), default=0))


def _rows(comparison: Comparison) -> list[list[str]]:
    return [
        [label, _seeds(comparison, n), *map(shown, comparison.cells[n])] for n, label in enumerate(comparison.labels)
    ]


def _header(comparison: Comparison) -> list[str]:
    return ["run", "seeds", *comparison.metrics]


def terminal(comparison: Comparison) -> RichTable:
    """For the console."""
    caption = "mean ± half of the 95 % interval over seeds (Student's t)"
    names = [name.replace("/", "\n").replace("_", "\n") for name in _header(comparison)]  # narrow columns
    table = RichTable(*map(escape, names), box=box.SIMPLE_HEAD, caption=caption)
    for row in _rows(comparison):
        table.add_row(*map(escape, row))
    return table


def as_csv(comparison: Comparison) -> str:
    """One row for each run group, with mean, interval and number of seeds of each metric in columns of their own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", *(f"{m} {part}" for m in comparison.metrics for part in ("mean", "low", "high", "seeds"))])
    for label, cells in zip(comparison.labels, comparison.cells, strict=True):
        parts = [("", "", "", 0) if c is None else (c.value, c.low, c.high, c.n) for c in cells]
        writer.writerow([label, *("" if value is None else value for part in parts for value in part)])
    return out.getvalue()


def markdown(comparison: Comparison) -> str:
    """A GitHub table."""
    header = _header(comparison)
    lines = [header, ["---"] * len(header), *_rows(comparison)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def latex(comparison: Comparison) -> str:
    """A booktabs tabular."""
    header = _header(comparison)

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(_LATEX.get(c, c) for c in cell).replace("±", r"$\pm$") for cell in cells) + r" \\"

    columns = "l" + "r" * (len(header) - 1)
    body = [line(row).replace("–", "--").replace("Δ", r"$\Delta$") for row in _rows(comparison)]
    parts = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(header).replace("Δ", r"$\Delta$"), r"\midrule"]
    return "\n".join([*parts, *body, r"\bottomrule", r"\end{tabular}", ""])
