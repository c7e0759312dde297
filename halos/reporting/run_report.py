"""Prints what a run is about to do and what came out: the data, one example, the plan, and the result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from lightning.pytorch.utilities import rank_zero_only
from rich import box
from rich.table import Table
from rich.text import Text

from halos.sampling.before_after import Comparison
from halos.sampling.budget import SamplingPlan
from halos.terminal import console, say, styled

Validated = tuple[int, Mapping[str, float]]
"""The optimizer step of a validation, and its metrics without ``val/``."""
FIRST = (*("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/auc", "kl", "loss"),)
"""Metrics that stand above the others."""
UNITS = {
    "kl": "nats", "z0": "nats", "z0/raw": "nats", "logps/": "nats", "log_ratio/": "nats", "entropy": "nats",
    "samples/length": "tokens",
}  # fmt: skip
"""Units of metrics, by their names or what these begin with; shares, rewards and losses have none."""
NO_VALIDATION = "none: data.val_size=200 would hold 200 records out"
"""What a run without validation data is told."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run is about to do.

    Attributes:
        steps: optimizer steps.
        examples: training examples; None for a stream.
        passes: over them; None for a stream.
        batch_size: examples of a device and micro-batch.
        devices: ranks with data of their own.
        accumulate: micro-batches of a step.
        validations: how often the policy is validated.
        validated: examples of a validation.
        validation_share: the computation of all validations as a share of training's.
        sampling: which validations sample replies.
        resumed: the step from which a resumed run goes on.
        nothing_to_resume: whether ``resume=auto`` has found no checkpoint.
        output_dir: where everything is written.
    """

    steps: int
    examples: int | None
    passes: float | None
    batch_size: int
    devices: int
    accumulate: int
    validations: int = 0
    validated: int = 0
    validation_share: float = 0.0
    sampling: SamplingPlan | None = None
    resumed: int | None = None
    nothing_to_resume: bool = False
    output_dir: str

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield what is printed: a label and a text."""
        if self.examples is None or self.passes is None:
            yield "data", "a stream"
        else:
            passes = round(self.passes, 1 if self.passes >= 1 else 3)
            yield "data", f"{_count(self.examples, 'example')}, {_count(passes, 'pass', 'es')}"
        size = self.batch_size * self.devices * self.accumulate
        micro = f" × {self.accumulate} micro-batches" if self.accumulate > 1 else ""
        parts = f" ({self.batch_size} a device × {_count(self.devices, 'device')}{micro})"
        yield "steps", f"{self.steps:,} of {_count(size, 'example')}{parts}"
        if self.resumed is not None:
            yield "resume", f"goes on from step {self.resumed:,}"
        elif self.nothing_to_resume:
            yield "resume", "there is no checkpoint yet: starts at step 0"
        yield from self._measured()
        yield "output", self.output_dir

    def _measured(self) -> Iterator[tuple[str, str]]:
        if not self.validations:
            yield "validation", NO_VALIDATION
        else:
            often = f"{self.validations} times {_count(self.validated, 'example')}"
            yield "validation", f"{often}, {_share(self.validation_share)}"
        if (sampling := self.sampling) is not None:
            often = f"{len(sampling.steps)} times" if sampling.validations else "at the end"
            what = "the KL on" if sampling.kl else "replies to"
            yield "sampling", f"{often} {what} {_count(sampling.prompts, 'prompt')}, {_share(sampling.share)}"


@rank_zero_only
def show_plan(plan: RunPlan) -> None:
    """Print what will happen before it happens."""
    for label, text in plan.lines():
        # Not wrapped, so that a long path can be copied.
        console.print(f"{label:<12}{text}", soft_wrap=True)
    say("")


def _count(number: float, name: str, plural: str = "s") -> str:
    shown_number = int(number) if number % 1 == 0 else number
    return f"{shown_number:,} {name}{'' if number == 1 else plural}"


def _share(share: float) -> str:
    return f"about {share:.0%} of training's computation"


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
def show_metrics(validations: Sequence[Validated], best_step: int | None = None) -> None:
    """Print the metrics of the first validation, of the best and of the last.

    Args:
        validations: all of them.
        best_step: the step of the best one; None: that with the lowest loss.
    """
    if not validations:
        console.print(f"validation: {NO_VALIDATION}")
        return
    shown = {"final": validations[-1]}
    if len(validations) > 1:
        chosen = [one for one in validations if one[0] == best_step]
        best = chosen[-1] if chosen else min(validations, key=_loss)
        shown = {"start": validations[0], "best": best} | shown
    # In two lines, so that the table fits into 80 columns.
    table = Table("validation", *(f"{name}\nstep {step}" for name, (step, _) in shown.items()), box=box.SIMPLE_HEAD)
    final = validations[-1][1]
    for name in [*filter(final.__contains__, FIRST), *(name for name in final if name not in (*FIRST, *IN_FIRST))]:
        table.add_row(_with_unit(name), *(_value(metrics, name) for _, metrics in shown.values()))
    console.print(table)


def _loss(validated: Validated) -> float:
    loss = validated[1].get("loss", 0.0)
    return math.inf if math.isnan(loss) else loss


def _with_unit(name: str) -> str:
    unit = UNITS.get(name) or UNITS.get(f"{name.partition('/')[0]}/")
    return name if unit is None else f"{name} ({unit})"


def _value(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:  # a validation that sampled no replies
        return "–"
    if name == "kl":
        error = f" ± {metrics['kl_error']:.2f}" if "kl_error" in metrics else ""
        return f"{metrics['kl']:z.2f}{error}"
    return f"{metrics[name]:z.4f}"  # z: a small negative number is no -0.0000


ROUNDS = {
    "loss": "metrics/loss",
    "margin": "metrics/rewards/margins",
    "accuracy": "metrics/rewards/accuracies",
    "AUC": "metrics/rewards/auc",
    "KL": "metrics/kl",
    "desirable": "samples/policy_desirable",
    "true reward": "samples/policy_reward",
}
"""Columns of the table of rounds, and where their numbers stand in a summary."""


@rank_zero_only
def show_rounds(summaries: Mapping[int, Mapping[str, Any]]) -> None:
    """Print what came of each round in a table. The KL of a round is to the reference of that round.

    Args:
        summaries: of the rounds, by their numbers.
    """
    values = {number: {name: _entry(one, path) for name, path in ROUNDS.items()} for number, one in summaries.items()}
    names = [name for name in ROUNDS if any(entries[name] is not None for entries in values.values())]
    table = Table("round", "trained with", *names, box=box.SIMPLE_HEAD)
    for number, entries in values.items():
        shown = ("–" if (value := entries[name]) is None else f"{value:.3g}" for name in names)
        table.add_row(str(number), str(summaries[number].get("loss", "–")), *shown)
    console.print(table)


def _entry(summary: Mapping[str, Any], path: str) -> float | None:
    section, _, name = path.partition("/")
    value = (summary.get(section) or {}).get(name)
    return float(value) if isinstance(value, int | float) else None


def show_where_next(root: Path, model: Path) -> None:
    """Print where the curves and the model are."""
    if (root / "tensorboard").is_dir():
        say(f"curves: tensorboard --logdir {root}")
    say(f"model:  {model}")


def _marked(text: str, desirable: bool) -> Text:
    return styled(("✓", "green") if desirable else ("✗", "red"), f" {text}")
