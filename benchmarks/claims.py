"""``python -m benchmarks.claims [NAME …]``: the claims of the KTO paper, with seeds added until they decide.

Each experiment ``claims_NAME`` runs with 5 seeds, then 10, then 20, as long as its claim is undecided and the minutes
last. Every verdict is written as soon as it is there, so that nothing is lost when the command is stopped. Started
again, it passes over the runs that are finished.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from halos.comparison.claims import UNDECIDED, Verdict, decide
from halos.comparison.runs import read_runs
from halos.files import write_atomically

NAMES = (
    "objectives",
    "ablations",
    "noise",
    "one_per_prompt",
    "imbalance",
    "without_sft",
    "beta",
    "loss_aversion",
)
SEEDS = (5, 10, 20)
"""Of each look; their number is ``claim.looks`` in conf/experiment/claims.yaml."""


def main(words: list[str] | None = None) -> None:
    """Run the experiments one after the other, and write a verdict after each look."""
    made = argparse.ArgumentParser("benchmarks.claims", description=__doc__)
    made.add_argument("names", nargs="*", choices=[[], *NAMES], default=[])
    made.add_argument("--minutes", type=float, default=150.0, help="no look starts after them")
    made.add_argument("--results", type=Path, default=Path("benchmarks/results/claims"))
    options = made.parse_args(words)
    end = time.monotonic() + 60 * options.minutes
    for name in options.names or NAMES:
        done = 0
        for seeds in SEEDS:
            if time.monotonic() > end:
                break
            start = time.monotonic()
            subprocess.run(command(name, done, seeds), check=True)
            verdict = verdict_of(name)
            write(options.results / f"{name}.json", verdict, (time.monotonic() - start) / 60)
            print(verdict.sentence(), flush=True)
            done = seeds
            if verdict.outcome != UNDECIDED:
                break


def command(name: str, done: int, seeds: int) -> list[str]:
    """The sweep over the seeds from ``done`` on."""
    return [
        sys.executable,
        "scripts/train.py",
        "-m",
        f"experiment=claims_{name}",
        f"seed=range({done},{seeds})",
        "resume=auto",
    ]


def verdict_of(name: str) -> Verdict:
    """The claim's verdict from all runs so far."""
    return decide(read_runs([f"out/claims/{name}"])[0])[0]


def write(file: Path, verdict: Verdict, minutes: float) -> None:
    """Write a verdict as JSON."""
    contrasts = [
        {"at": one.at, "above": one.above, "difference": difference and difference.as_json(), "outcome": outcome}
        for one, difference, outcome in zip(verdict.claim.contrasts, verdict.differences, verdict.outcomes, strict=True)
    ]
    values = {
        "states": verdict.claim.states,
        "outcome": verdict.outcome,
        "level": verdict.claim.level,
        "runs": len(verdict.runs),
        "minutes_of_the_last_look": round(minutes, 1),
        "contrasts": contrasts,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
