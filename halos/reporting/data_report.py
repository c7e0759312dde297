"""Shows what is in the data and what is wrong with it: tables, an example, ``data_report.json``, a plot of the lengths.

Neither torch nor Lightning is imported here, so that ``halos data`` starts at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.table import Table

from halos.data.preparation.hygiene import Finding
from halos.data.preparation.intake import Intake
from halos.data.records.adapted import NOTED, FileCounts
from halos.data.rows.token_rows import Row
from halos.files import write_atomically
from halos.processes.first import first_process_only, on_first_process
from halos.terminal import console, styled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPORT = "data_report.json"
COUNTS = ("records", "completions", "desirable", "undesirable", "scored", "preferences")
FINDINGS = {
    "duplicates": "duplicates, word for word",
    "near_duplicates": "duplicates but for case and spaces",
    "contradictions": "marked both desirable and undesirable",
    "contradictory_pairs": "preferred both ways round",
    "identical_pairs": "pairs with identical sides",
    "equal_pairs": "pairs with the same tokens on both sides",
}
"""Kinds of findings, and their labels in the table."""


@first_process_only
def show_report(intake: Intake) -> None:
    """Print counts of what was read, and the findings with the first records of each."""
    splits = intake.hygiene
    if not splits:  # a stream without validation data: nothing is read before training
        return
    table = Table("feedback", *splits, "for example", box=box.SIMPLE_HEAD)
    for name in COUNTS:
        if any(getattr(summary, name) for summary in splits.values()):
            table.add_row(name, *(f"{getattr(summary, name):,}" for summary in splits.values()), "")
    for name, label in FINDINGS.items():
        findings: list[Finding] = [getattr(summary, name) for summary in splits.values()]
        if any(finding.count for finding in findings):
            ids = next(finding.ids for finding in findings if finding.count)
            table.add_row(label, *(f"{finding.count:,}" for finding in findings), ", ".join(ids[:2]))
    if intake.leaks.count:
        counts = [f"{intake.leaks.count:,}" if split == "val" else "" for split in splits]
        table.add_row("prompts of training, left out", *counts, ", ".join(intake.leaks.ids[:2]))
    for name in next(iter(splits.values())).lengths:
        table.add_row(
            f"{name}, median / 95% / longest", *(_lengths(f.lengths.get(name, {})) for f in splits.values()), ""
        )
    for split, origins in intake.origins.items():
        for file, origin in origins.items():
            for label, count, place in _lines(Path(file).name, origin):
                table.add_row(label, *(f"{count:,}" if other == split else "" for other in splits), place)
    console.print(table)


def _lines(file: str, origin: FileCounts) -> Iterator[tuple[str, int, str]]:
    """Yield lines about a file's rows and columns: a label, a count, and places or columns."""
    for reason, count in origin.dropped.items():
        yield f"left out of {file}: {reason}", count, origin.places[reason][0]
    for what, count in origin.noted.items():
        yield f"{file}: {what}", count, origin.places[f"{NOTED}{what}"][0]
    unused = [column.removesuffix(": unused") for column in origin.columns if column.endswith(": unused")]
    used = [column for column in origin.columns if not column.endswith(": unused")]
    for label, columns in (("columns", used), ("columns that are unused", unused)):
        if columns:
            yield f"{file}: {label}", len(columns), ", ".join(columns)


def _lengths(percentiles: Mapping[str, int]) -> str:
    return " / ".join(f"{percentiles[p]:,}" for p in ("p50", "p95", "p100")) if percentiles else ""


def write_report(intake: Intake, folder: Path) -> None:
    """Write ``data_report.json`` on the first process."""
    if on_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(intake.report(), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / REPORT, text + "\n")


def plot_lengths(lengths: Mapping[str, np.ndarray], file: Path) -> None:
    """Draw one picture with a histogram of the lengths for each name."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(4.5 * len(lengths), 3.2), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths.items(), strict=True):
        axes.hist(values, bins=50)
        axes.set(xlabel=name, ylabel="number")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


@first_process_only
def show_data(reports: Mapping[str, Counter[str]]) -> None:
    """Print how many records and examples were read, converted, cut and dropped."""
    # A reason may occur in one split only; Counters give 0 for the other.
    table = Table("data", *reports, box=box.SIMPLE_HEAD)
    for name in dict.fromkeys(name for report in reports.values() for name in report):
        table.add_row(name, *(f"{report[name]:,}" for report in reports.values()))
    console.print(table)


@first_process_only
def show_example(row: Row, tokenizer: PreTrainedTokenizerBase, branches: Sequence[str]) -> None:
    """Print one decoded example with its scored tokens in ⟦brackets⟧ (and green, on a terminal).

    Args:
        row: the example.
        tokenizer: decodes it.
        branches: a name for each of its completions.
    """
    console.print(styled(("One example", "bold"), f" ({row.id}); the tokens in ⟦brackets⟧ are scored:"))
    # Decoded with special tokens: doubled BOS or a missing end of turn are what a reader looks for here.
    prompt = str(tokenizer.decode(list(row.prompt)))
    for k, (name, branch) in enumerate(zip(branches, row.branches, strict=True)):
        pieces: list[str | tuple[str, str]] = []
        scored = set(row.scored(k))
        for is_scored, places in groupby(range(len(branch)), key=scored.__contains__):
            text = str(tokenizer.decode([branch[place] for place in places]))
            pieces += [("⟦", "bold"), (text, "green"), ("⟧", "bold")] if is_scored else [text]
        console.print(styled((f"  {name}:", "dim"), f" {prompt}", *pieces))
    console.print()
