"""Prints the results of an evaluation on the terminal."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table

from halos import terminal
from halos.evaluation.results import Results
from halos.evaluation.statistics import Estimate


def show(results: Results) -> None:
    """Print metrics with their intervals, the win rate, the judge's report and the results of tasks."""
    table = Table("metric", "value", "95 % interval", "prompts", box=box.SIMPLE_HEAD, title=results.policy)
    # A metric may be undefined, such as the AUC of labels of one class.
    for name, estimate in results.metrics.items():
        value = f"{estimate.value:z.4f}" if math.isfinite(estimate.value) else "–"
        table.add_row(name, value, _interval(estimate), str(estimate.n))
    terminal.console.print(table)
    if results.win_rate is not None:
        won = results.win_rate
        outcomes = ", ".join(f"{count} {name}" for name, count in won.outcomes.items())
        more = f" {_interval(won.rate)}, p = {won.p_value:.2g} ({outcomes})"
        rate = f"{won.rate.value:.1%}", "bold"
        terminal.console.print(terminal.styled(f"win rate against {results.opponent}: ", rate, more))
    for name, number in (results.judge or {}).items():
        terminal.say(f"judge, {name}: {number:g}")
    for task, metrics in (results.tasks or {}).items():
        for name, number in metrics.items():
            terminal.say(f"{task} {name}: {number:z.4f}")


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return "–"
    return f"{estimate.low:z.4f} … {estimate.high:z.4f}"
