"""Prints what a run is about to do and what came out: the data, one example, the plan, and the result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from lightning.pytorch.utilities import rank_zero_only
from rich import box
from rich.table import Table
from rich.text import Text

from halos.sampling.before_after import Comparison
from halos.terminal import console, say, styled


class CacheReport(TypedDict):
    """Completions that a run reads, how many of them were cached and computed, the time, and the cache's folder."""

    completions: int
    found: int
    computed: int
    seconds: float
    folder: str


@rank_zero_only
def show_reference(report: CacheReport) -> None:
    """Print what the cache of the reference's log-probs had, what was added, and where it is."""
    counts = (
        f"reference log-probs of {report['completions']:,} completions: {report['found']:,} were cached, "
        f"{report['computed']:,} computed in {report['seconds']:.1f} s → "
    )
    console.print(styled(counts, (report["folder"], "bold")), soft_wrap=True)


def show_plan(steps: int, examples: int | None, batch_size: int, root: str) -> None:
    """Print how long the run will be, and where its output goes; ``examples`` is None for a stream."""
    over = "a stream" if examples is None else f"{examples:,} examples"
    say(f"{steps:,} steps over {over}, {batch_size} a device and micro-step → {root}\n")


@rank_zero_only
def show_comparison(comparison: Comparison) -> None:
    """Print how reference and policy do on held-out prompts, with the first replies of both."""
    reference, policy = comparison.reference, comparison.policy
    table = Table("", "reference", "policy", box=box.SIMPLE_HEAD, title=f"{len(comparison.prompts)} held-out prompts")
    table.add_row("desirable by the true reward", f"{reference.desirable_share:.1%}", f"{policy.desirable_share:.1%}")
    table.add_row("mean true reward", f"{reference.mean_reward:.3f}", f"{policy.mean_reward:.3f}")
    table.add_row("KL(policy ‖ reference), nats per completion", "0", f"{comparison.kl:.2f}")
    console.print(table)
    replies = Table("prompt", "reference", "policy", box=box.SIMPLE_HEAD, show_lines=True)
    for index in range(min(3, len(comparison.prompts))):
        replies.add_row(
            comparison.prompts[index],
            _marked(reference.completions[index], reference.desirable[index]),
            _marked(policy.completions[index], policy.desirable[index]),
        )
    console.print(replies)


@rank_zero_only
def show_metrics(metrics: Mapping[str, float]) -> None:
    """Print the final validation metrics."""
    # A run without validation data has no metrics, and an empty table says nothing.
    if not metrics:
        return
    table = Table("validation", "final", box=box.SIMPLE_HEAD)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)


def show_where_next(root: Path, model: Path) -> None:
    """Print where the curves and the model are."""
    say(f"curves: tensorboard --logdir {root}")
    say(f"model:  {model}")


def _marked(text: str, desirable: bool) -> Text:
    return styled(("✓", "green") if desirable else ("✗", "red"), f" {text}")
