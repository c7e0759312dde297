"""The result of an evaluation on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich import box
from rich.markup import escape
from rich.table import Table

from halos.terminal import console


@rank_zero_only
def show(results: Mapping[str, Any]) -> None:
    """Metrics with their intervals, the win rate, and results of tasks."""
    table = Table("metric", "value", "95 % interval", "prompts", box=box.SIMPLE_HEAD, title=escape(results["policy"]))
    for name, found in results["metrics"].items():
        table.add_row(name, _number(found["value"]), _interval(found), str(found["n"]))
    console.print(table)
    if "win_rate" in results:
        _show_win_rate(results["win_rate"])
    for name, value in results.get("judge", {}).items():
        console.print(f"judge, {name}: {value:g}", highlight=False)
    for task, metrics in results.get("tasks", {}).items():
        for name, value in metrics.items():
            console.print(f"{escape(task)} {escape(name)}: {value:.4f}", highlight=False)


def _show_win_rate(found: Mapping[str, Any]) -> None:
    ended = ", ".join(f"{found[name]} {name}" for name in ("won", "tied", "lost", "without an answer"))
    console.print(
        f"win rate against {escape(found['opponent'])}: [bold]{found['value']:.1%}[/] {_interval(found)}, "
        f"p = {found['p_value']:.2g} ({ended})",
        highlight=False,
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _interval(found: Mapping[str, Any]) -> str:
    return "–" if found["low"] is None else f"{found['low']:.4f} … {found['high']:.4f}"
