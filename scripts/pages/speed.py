"""The tables of docs/results/speed.md, from the runs in benchmarks/results/speed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contest import MEMORY, SPEED, memory_rows, rows_of
from benchmarks.profile_table import section
from benchmarks.table import table

ROOT = Path(__file__).parents[2]
SPEED_PAGE = ROOT / "docs" / "results" / "speed.md"
RUNS = ROOT / "benchmarks" / "results" / "speed"
"""Files ``runs.json`` of the benchmark's output folder, one a machine and section."""
BLOCK = re.compile(r"(<!-- from benchmarks/results/speed: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
LEFT_OUT = ("losses differ by",)
"""Columns of the comparison that the page states in a sentence."""


def speed_page() -> str:
    """Return the page with its tables written anew.

    Raises:
        ValueError: a block with a name that no table has.
    """
    records = [run for file in sorted(RUNS.glob("*.json")) for run in json.loads(file.read_text("utf-8"))["runs"]]
    tables = {
        "comparison": _without(LEFT_OUT, rows_of(records)),
        "memory": table(MEMORY, memory_rows(records)),
        "profiles": section(profile_cases(records)),
    }

    def fill(block: re.Match[str]) -> str:
        if block[2] not in tables:
            raise ValueError(f"{SPEED_PAGE.name}: expected a block of {', '.join(tables)}, found {block[2]}")
        return f"{block[1]}\n{tables[block[2]]}\n{block[3]}"

    return BLOCK.sub(fill, SPEED_PAGE.read_text("utf-8"))


def _without(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    kept = [n for n, name in enumerate(SPEED) if name not in names]
    return table([SPEED[n] for n in kept], [[row[n] for n in kept] for row in rows])


def profile_cases(
    records: Sequence[Mapping[str, Any]],
) -> list[tuple[str, Mapping[str, Any] | None, Mapping[str, Any] | None]]:
    """Return the profiles of each loss and precision: with one thread, and with several."""
    cases: dict[str, dict[bool, Mapping[str, Any]]] = {}
    for record in records:
        job = record["job"]
        if job["kind"] == "profile":
            name = f"{job['loss'].upper()}, {job['precision']}"
            cases.setdefault(name, {})[job["threads"] > 1] = record["result"]
    return [(name, found.get(False), found.get(True)) for name, found in cases.items()]
