"""Prints the results of an evaluation on the terminal."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table

from halos import terminal
from halos.evaluation.duels import WinRate
from halos.evaluation.results import Results
from halos.evaluation.statistics import Estimate


def show(results: Results) -> None:
    """Print metrics with their intervals, the win rate, the judge's report and the results of tasks."""
    table = Table("metric", "value", "95 % interval", "prompts", box=box.SIMPLE_HEAD, title=results.policy)
    # A metric may be undefined, such as the AUC of labels of one class.
    for name, estimate in results.metrics.items():
        value = f"{estimate.value:.4f}" if math.isfinite(estimate.value) else "–"
        table.add_row(name, value, _interval(estimate), str(estimate.n))
    terminal.console.print(table)
    if results.win_rate is not None:
        _show_win_rate(results.opponent, results.win_rate)
    for name, number in (results.judge or {}).items():
        terminal.say(f"judge, {name}: {number:g}")
    for task, metrics in (results.tasks or {}).items():
        for name, number in metrics.items():
            terminal.say(f"{task} {name}: {number:.4f}")


def _show_win_rate(opponent: str, win_rate: WinRate) -> None:
    outcomes = ", ".join(f"{count} {name}" for name, count in win_rate.outcomes.items())
    rate = f"{win_rate.rate.value:.1%}"
    more = f" {_interval(win_rate.rate)}, p = {win_rate.p_value:.2g} ({outcomes})"
    terminal.console.print(terminal.styled(f"win rate against {opponent}: ", (rate, "bold"), more))


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return "–"
    return f"{estimate.low:.4f} … {estimate.high:.4f}"
