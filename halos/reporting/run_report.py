"""Prints what a run is about to do and what came out: the data, one example, the plan, and the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from lightning.pytorch.utilities import rank_zero_only
from rich import box
from rich.table import Table
from rich.text import Text

from halos.sampling.before_after import Comparison
from halos.sampling.budget import SamplingPlan
from halos.terminal import console, say, styled

Validated = tuple[int, Mapping[str, float]]
"""The optimizer step of a validation, and its metrics without ``val/``."""
FIRST = ("loss", "rewards/margins", "kl")
"""Metrics that stand above the others."""
IN_FIRST = ("kl_error", "kl_per_token")
"""Metrics that are not printed: the KL's error stands next to it."""


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


def show_plan(steps: int, examples: int | None, batch_size: int, root: str, sampling: SamplingPlan | None) -> None:
    """Print how long the run will be, what is sampled, and where its output goes; ``examples``: None for a stream."""
    over = "a stream" if examples is None else f"{examples:,} examples"
    say(f"{steps:,} steps over {over}, {batch_size} a device and micro-step → {root}")
    if sampling is not None:
        what = f"{'KL from ' if sampling.kl else ''}replies to {sampling.prompts} prompts"
        often = f"at {len(sampling.steps)} of {sampling.validations} validations"
        times = often if sampling.validations else "at the end"
        say(f"{what} {times} (about {sampling.share:.0%} of training's computation)")
    say("")


@rank_zero_only
def show_comparison(comparison: Comparison) -> None:
    """Print how reference and policy do on held-out prompts, with the first replies of both."""
    reference, policy = comparison.reference, comparison.policy
    table = Table("", "reference", "policy", box=box.SIMPLE_HEAD, title=f"{len(comparison.prompts)} held-out prompts")
    table.add_row("desirable by the true reward", f"{reference.desirable_share:.1%}", f"{policy.desirable_share:.1%}")
    table.add_row("mean true reward", f"{reference.mean_reward:.3f}", f"{policy.mean_reward:.3f}")
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
def show_metrics(validations: Sequence[Validated]) -> None:
    """Print the metrics of the first validation, of the one with the lowest loss, and of the last."""
    # A run without validation data has no metrics, and an empty table says nothing.
    if not validations:
        return
    shown = {"final": validations[-1]}
    if len(validations) > 1:
        best = min(validations, key=_loss)
        shown = {"start": validations[0], "best": best} | shown
    table = Table("validation", *(f"{name}, step {step}" for name, (step, _) in shown.items()), box=box.SIMPLE_HEAD)
    final = validations[-1][1]
    for name in [*filter(final.__contains__, FIRST), *(name for name in final if name not in (*FIRST, *IN_FIRST))]:
        table.add_row(name, *(_value(metrics, name) for _, metrics in shown.values()))
    console.print(table)


def _loss(validated: Validated) -> float:
    loss = validated[1].get("loss", 0.0)
    return math.inf if math.isnan(loss) else loss


def _value(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:  # a validation that sampled no replies
        return "–"
    if name == "kl":
        error = f" ± {metrics['kl_error']:.2f}" if "kl_error" in metrics else ""
        return f"{metrics['kl']:.2f}{error}"
    return f"{metrics[name]:.4f}"


def show_where_next(root: Path, model: Path) -> None:
    """Print where the curves and the model are."""
    say(f"curves: tensorboard --logdir {root}")
    say(f"model:  {model}")


def _marked(text: str, desirable: bool) -> Text:
    return styled(("✓", "green") if desirable else ("✗", "red"), f" {text}")
