"""The measured reference points as a table and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from halos.evaluation.reference_points import Measured
from halos.evaluation.statistics import Estimate
from halos.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = ("estimator", "mean z₀", "before the clamp", "bias", "deviation", "error", "z₀ > 0", "seconds a step")


def write(folder: Path, measured: Sequence[Measured], kl: Estimate, batch_size: int) -> None:
    """Write the table as Markdown and CSV, and the figure as PNG and SVG."""
    write_atomically(folder / "reference_points.md", markdown(measured, kl, batch_size) + "\n")
    write_atomically(folder / "reference_points.csv", as_csv(measured))
    for suffix in ("png", "svg"):
        draw(measured, kl).savefig(folder / f"reference_points.{suffix}", dpi=150)


def truth(kl: Estimate, batch_size: int) -> str:
    """Return a line about the true KL, which the estimators are compared with."""
    low, high = (kl.value if end is None else end for end in (kl.low, kl.high))
    interval = f"95 % interval {low:z.3f} to {high:z.3f}"
    return f"KL = {kl.value:z.3f} nats per completion ({interval}), {batch_size} examples a step"


def cells(one: Measured) -> list[str]:
    """Return the cells of an estimator's row in the order of HEADER."""
    nats = (one.z0, one.raw, one.bias, one.deviation, one.error)
    return [one.name, *(f"{value:z.3f}" for value in nats), f"{one.positive:.0%}", f"{one.seconds:.4f}"]


def markdown(measured: Sequence[Measured], kl: Estimate, batch_size: int) -> str:
    """Return the table as Markdown, after the line about the true KL."""
    rows = [HEADER, ["---", *["---:"] * (len(HEADER) - 1)], *map(cells, measured)]
    return "\n".join([truth(kl, batch_size), "", *(f"| {' | '.join(row)} |" for row in rows)])


def terminal(measured: Sequence[Measured], kl: Estimate, batch_size: int) -> Table:
    """Return the table for the console."""
    table = Table(box=box.SIMPLE_HEAD, caption=truth(kl, batch_size), padding=(0, 1, 0, 0))
    for name in HEADER:
        table.add_column(name, no_wrap=name == HEADER[0], justify="left" if name == HEADER[0] else "right")
    for one in measured:
        table.add_row(*cells(one))
    return table


def as_csv(measured: Sequence[Measured]) -> str:
    """Return the measurements with all digits, as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Measured)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, measured))
    return out.getvalue()


def draw(measured: Sequence[Measured], kl: Estimate) -> Figure:
    """Draw each estimator's mean and standard deviation next to the true KL and its interval."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(6.4, 0.6 + 0.5 * len(measured)), layout="constrained")
    axes = figure.subplots()
    places = range(len(measured))
    means, deviations = [one.z0 for one in measured], [one.deviation for one in measured]
    axes.errorbar(means, places, xerr=deviations, fmt="o", capsize=3, label="mean ± standard deviation of z₀")
    axes.axvline(kl.value, color="black", linewidth=1, label="true KL")
    if kl.low is not None and kl.high is not None:
        axes.axvspan(kl.low, kl.high, color="black", alpha=0.12, linewidth=0)
    axes.set_yticks(places, [one.name for one in measured])
    axes.invert_yaxis()
    axes.set_xlabel("nats per completion")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    return figure
