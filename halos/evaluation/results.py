"""Results of an evaluation as values, and the files that they are written to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halos.evaluation.calibration import draw_reliability
from halos.evaluation.duels import WinRate
from halos.evaluation.statistics import Estimate
from halos.files import write_atomically


@dataclass(frozen=True, slots=True)
class SampledPrompt:
    """The policy's completions of a prompt, and the opponent's completions that the judge compared them with."""

    prompt: str
    completions: list[str]
    opponent: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, str | list[str]]:
        """The fields by name; ``opponent`` only where there was one."""
        line: dict[str, str | list[str]] = {"prompt": self.prompt, "completions": self.completions}
        return {**line, "opponent": self.opponent} if self.opponent else line


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything that an evaluation has computed so far.

    Attributes:
        policy: the name of the evaluated model.
        reference: the name of its reference, if there is one.
        beta: β of the implied rewards.
        counts: the numbers of records, pairs and labels.
        left_out: how much of the data was left out, by reason.
        metrics: estimates by metric name.
        rewards: (reward with β, whether the completion is desirable) of each held-out label; None before they are
            known, and without a reference.
        margins: r_chosen − r_rejected of each held-out pair.
        samples: the policy's samples.
        opponent: whom the judge compares the policy with: ``reference``, ``data`` or a model's name.
        win_rate: the policy's win rate.
        judge: what the judge's answers cost.
        tasks: {task: {metric: value}} of standard tasks.
    """

    policy: str
    reference: str | None
    beta: float
    counts: Mapping[str, int]
    left_out: Mapping[str, int]
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    rewards: Sequence[tuple[float, bool]] | None = None
    margins: Sequence[float] = ()
    samples: Sequence[SampledPrompt] | None = None
    opponent: str = "reference"
    win_rate: WinRate | None = None
    judge: Mapping[str, float] | None = None
    tasks: Mapping[str, Mapping[str, float]] | None = None

    def as_json(self) -> dict[str, Any]:
        """The content of ``evaluation.json``; parts that were not evaluated are absent."""
        win_rate = None if self.win_rate is None else {"opponent": self.opponent, **self.win_rate.as_json()}
        optional = {"win_rate": win_rate, "judge": self.judge, "tasks": self.tasks}
        return {
            "policy": self.policy,
            "reference": self.reference,
            "beta": self.beta,
            "counts": self.counts,
            "left_out": self.left_out,
            "metrics": {name: estimate.as_json() for name, estimate in self.metrics.items()},
            **{name: value for name, value in optional.items() if value is not None},
        }


def write_results(folder: Path, results: Results, previous: Results | None = None) -> None:
    """Write the results into a folder, each file whole or not at all.

    Args:
        folder: exists already; gets ``evaluation.json``, and where there are any ``rewards.jsonl``,
            ``reliability.png`` and ``samples.jsonl``.
        results: what to write.
        previous: results that are already in the folder; files that would not change are left alone.
    """
    rewards, samples = results.rewards, results.samples
    if rewards is not None and (previous is None or rewards is not previous.rewards):
        lines = [{"reward": reward, "desirable": desirable} for reward, desirable in rewards]
        _write_lines(folder / "rewards.jsonl", lines)
        if results.margins:
            draw_reliability(results.margins, folder / "reliability.png")
    if samples is not None and (previous is None or samples is not previous.samples):
        _write_lines(folder / "samples.jsonl", (sampled.as_json() for sampled in samples))
    # NaN is no JSON; estimates that are not defined have become null.
    text = json.dumps(results.as_json(), indent=2, allow_nan=False) + "\n"
    write_atomically(folder / "evaluation.json", text)


def _write_lines(file: Path, lines: Iterable[Mapping[str, object]]) -> None:
    write_atomically(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
