"""The comparison: every contestant trains on the same rows, in rounds. A table has the results of all runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any

from benchmarks import plain, trl_side
from benchmarks.job import Job
from benchmarks.plan import Plan
from benchmarks.runner import Result
from benchmarks.table import number, table

TOLERANCE = 1e-4
"""The largest allowed difference between contestants' losses of the first step in float32."""
CACHED, WITH_ENTROPY = "ours, reference cached", "ours, with entropy"
NAMES = {
    "plain": "plain loop",
    "liger": "plain loop, Liger's loss",
    "trl": "TRL",
    "trl_lean": "TRL, no extra outputs",
    "trl_best": "TRL, as fast as we could patch it",
}
OURS = ("ours", WITH_ENTROPY, CACHED)
CACHED_REPEAT = 1000
"""Added to a round's number for a second run of the same job, which finds the reference in the cache."""


def speed(plan: Plan) -> str:
    """Run the rounds: ours, each peer, ours with entropy, ours with the reference cached. Returns the tables."""
    for precision in plan.precisions:
        plan.runner.run(replace(plan.base, kind="rate", precision=precision))
    for case in plan.cases():
        plan.runner.run(replace(case, kind="saved"))
    for repeat, case in product(range(plan.repeats), tuple(plan.cases())):
        for turn in turns(plan, replace(case, repeat=repeat)):
            plan.runner.run(turn)
    records = plan.runner.records
    tables = table(SPEED, rows_of(records)), SPEED_NOTES, table(MEMORY, memory_rows(records)), MEMORY_NOTES
    return "\n\n".join(tables)


def turns(plan: Plan, job: Job) -> Iterator[Job]:
    """The runs of a round. Contestants that do not have the loss are left out."""
    ours = plan.cold(job)
    yield ours
    for who in plan.peers:
        if job.loss in (trl_side.LOSSES if who.startswith("trl") else plain.LOSSES):
            yield replace(job, who=who)
    yield plan.cold(replace(job, statistics=("entropy",)))
    yield replace(ours, repeat=ours.repeat + CACHED_REPEAT)


SPEED = (
    *("loss", "precision", "", "examples/s", "ours is faster", "with the reference cached"),
    *("peak GB", "ours takes", "tokens fed", "× needed", "losses differ by"),
)
SPEED_NOTES = (
    "Medians over rounds, with the range; CPU seconds with one thread, else seconds. *Ours is faster* (its reference "
    "pass included), *with the reference cached* (a second loss over the same data) and *ours takes* (of its memory) "
    "are medians of ratios within a round. *Floor*: the examples per second if the operations that the loss needs took "
    "all the time, at this machine's rate of matrix products; next to it, the share of our time that they would take. "
    "*Losses differ by*: the largest difference from ours in any step. All contestants had the same model, rows, "
    "order, y', AdamW and clipping."
)


MEMORY = ("loss", "precision", "weights, gradients, moments", "kept for backward", "together", "ours", "TRL")
MEMORY_NOTES = (
    "MiB. *Kept for backward*: what the forward pass of the largest step keeps, each block of memory once. In a run of "
    "a single step there are no moments at that time. *Ours* and *TRL*: the peak memory of the process, less what it "
    "had before it read the model; TRL's includes its reference model."
)


def memory_rows(records: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of counted memory and of the peaks of processes, one for each loss and precision."""
    records = list(records)
    rows = []
    for record in records:
        job, counted = record["job"], record["result"]
        if job["kind"] == "saved":
            parts = (counted["state_mb"], counted["saved_mb"])
            peaks = [peak_mb(records, job, who) for who in ("ours", NAMES["trl"])]
            cells = [f"{value:,.0f}" if value else "" for value in (*parts, sum(parts), *peaks)]
            rows.append([job["loss"], job["precision"], *cells])
    return rows


def peak_mb(records: Iterable[Mapping[str, Any]], case: Mapping[str, Any], who: str) -> float:
    """The median of a contestant's peak memory, less what its process had before it read the model; 0 without runs."""
    peaks = [
        record["result"]["peak_mb"] - record["result"]["before_mb"]
        for record in records
        if record["job"]["kind"] == "train"
        and contestant(record["job"]) == who
        and all(record["job"][name] == case[name] for name in ("loss", "precision"))
    ]
    return median(peaks) if peaks else 0.0


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the table from the records of a :class:`benchmarks.runner.Runner`, some for each loss and precision."""
    found: dict[tuple[str, str], dict[str, dict[int, Result]]] = {}
    rates: dict[str, Result] = {}
    for record in records:
        job, result = record["job"], record["result"]
        if job["kind"] == "rate":
            rates[job["precision"]] = result
        if job["kind"] == "train":
            # With one thread CPU seconds are close to the seconds on an idle machine, also if other programs run.
            seconds = result["cpu_seconds" if job["threads"] == 1 else "seconds"]
            who = found.setdefault((job["loss"], job["precision"]), {}).setdefault(contestant(job), {})
            who[job["repeat"] % CACHED_REPEAT] = result | {"seconds": seconds}
    return [row for case, results in found.items() for row in case_rows(*case, results, rates.get(case[1]))]


def contestant(job: Mapping[str, Any]) -> str:
    """The name of a run's contestant in the table."""
    if job["who"] != "ours":
        return NAMES[job["who"]]
    return WITH_ENTROPY if job["statistics"] else CACHED if job["repeat"] >= CACHED_REPEAT else "ours"


def case_rows(loss: str, precision: str, found: dict[str, dict[int, Result]], rate: Result | None) -> list[list[str]]:
    """Rows of one loss at one precision; ``found``: each contestant's results by the number of the round."""
    rows = []
    ours, cached = found.get("ours", {}), found.get(CACHED, {})
    for who, results in found.items():
        first = next(iter(results.values()))
        tokens = median(result["tokens"] for result in results.values())
        rows.append(
            [
                *(loss, precision, who),
                spread([result["examples"] / result["seconds"] for result in results.values()]),
                *("" if who in OURS else _ratio(results, other, "seconds") for other in (ours, cached)),
                f"{median(result['peak_mb'] for result in results.values()) / 1024:.1f}",
                "" if who in OURS else _share(ours, results, "peak_mb"),
                *(f"{tokens / 1000:.1f} k", number(tokens / first["needed_tokens"])),
                "" if who in OURS else _agreement(precision, ours, results),
            ]
        )
    return rows + ([_floor(loss, precision, list(ours.values()), rate)] if ours and rate else [])


def _floor(loss: str, precision: str, ours: list[Result], rate: Result) -> list[str]:
    seconds, needed = ours[0]["operations"] / rate["rate"], ours[0]["needed_tokens"]
    taken = f"{number(seconds / median(result['seconds'] for result in ours))} ×"
    pace = number(ours[0]["examples"] / seconds)
    name = f"floor ({rate['rate'] / 1e9:.0f} GFLOP/s)"
    return [loss, precision, name, pace, taken, "", "", "", f"{needed / 1000:.1f} k", "1", ""]


def spread(values: list[float], unit: str = "") -> str:
    """The median, with the range where there is more than one value."""
    text = f"{number(median(values))}{unit}"
    return text if len(values) == 1 else f"{text} ({number(min(values))}–{number(max(values))})"


def _ratios(above: dict[int, Result], below: dict[int, Result], name: str) -> list[float]:
    return [result[name] / below[round_][name] for round_, result in above.items() if round_ in below]


def _ratio(above: dict[int, Result], below: dict[int, Result], name: str) -> str:
    ratios = _ratios(above, below, name)
    return spread(ratios, " ×") if ratios else ""


def _share(part: dict[int, Result], whole: dict[int, Result], name: str) -> str:
    ratios = _ratios(part, whole, name)
    return f"{median(ratios):.0%}" if ratios else ""


def _agreement(precision: str, ours: dict[int, Result], results: dict[int, Result]) -> str:
    if not ours:
        return ""
    one, other = (next(iter(runs.values()))["losses"] for runs in (ours, results))
    differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
    warning = " (the first already)" if precision == "32-true" and differences[0] > TOLERANCE else ""
    return f"{max(differences):.0e}{warning}"
