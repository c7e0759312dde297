"""Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; raises ``ValueError`` for a row that has not a cell for each head."""
    for row in rows:
        if len(row) != len(heads):
            raise ValueError(f"expected {len(heads)} cells in a row, found {len(row)}: {', '.join(row)}")
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float) -> str:
    """Three significant digits."""
    digits = f"{value:.3g}"
    return f"{value:.0f}" if "e" in digits else digits
