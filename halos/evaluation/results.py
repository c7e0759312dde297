"""Results of an evaluation as values, and the files that they are written to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halos.evaluation.calibration import draw_reliability
from halos.evaluation.duels import WinRate
from halos.evaluation.statistics import Estimate
from halos.files import write_atomically

Line = Mapping[str, Any]
"""A line of a file of results."""


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
        rewards: for each held-out labelled completion, its ``reward`` (with β) and whether it is ``desirable``; None
            without a reference.
        margins: r_chosen − r_rejected of each held-out pair.
        samples: for each prompt its text (``prompt``), the policy's ``completions``, and under ``opponent`` those that
            the judge compared them with.
        opponent: what the judge compares the policy with: ``reference``, ``data`` or a model's name.
        remote_code: models whose own code was allowed to run.
        win_rate: the policy's win rate.
        judge: the judge's report, such as requests and cost.
        tasks: {task: {metric: value}} of standard tasks.
    """

    policy: str
    reference: str | None
    beta: float
    counts: Mapping[str, int]
    left_out: Mapping[str, int]
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    rewards: Sequence[Line] | None = None
    margins: Sequence[float] = ()
    samples: Sequence[Line] | None = None
    opponent: str = "reference"
    remote_code: Sequence[str] = ()
    win_rate: WinRate | None = None
    judge: Mapping[str, float] | None = None
    tasks: Mapping[str, Mapping[str, float]] | None = None

    def as_json(self) -> dict[str, Any]:
        """The content of ``evaluation.json``; parts that were not evaluated are absent."""
        content = {name: getattr(self, name) for name in ("policy", "reference", "beta", "counts", "left_out")}
        content["metrics"] = {name: estimate.as_json() for name, estimate in self.metrics.items()}
        if self.win_rate is not None:
            content["win_rate"] = {"opponent": self.opponent, **self.win_rate.as_json()}
        if self.remote_code:
            content["remote_code"] = list(self.remote_code)
        optional = {"judge": self.judge, "tasks": self.tasks}
        return content | {name: value for name, value in optional.items() if value is not None}


def write_results(folder: Path, results: Results) -> None:
    """Write the results into a folder, each file whole or not at all.

    Args:
        folder: an existing folder, for ``evaluation.json`` and, if there are such results, ``rewards.jsonl``,
            ``reliability.png`` and ``samples.jsonl``.
        results: what to write.
    """
    for name, lines in (("rewards", results.rewards), ("samples", results.samples)):
        if lines is not None:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_atomically(folder / f"{name}.jsonl", text)
    if results.margins and results.samples is None:  # the stages after the first do not change the margins
        draw_reliability(results.margins, folder / "reliability.png")
    # NaN is not valid JSON; undefined estimates have become null.
    text = json.dumps(results.as_json(), indent=2, allow_nan=False) + "\n"
    write_atomically(folder / "evaluation.json", text)
