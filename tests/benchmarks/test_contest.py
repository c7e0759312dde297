"""Rounds of the comparison, and the table from its results."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contest import CACHED, MEMORY, SPEED, WITH_ENTROPY, contestant, memory_rows, rows_of, speed
from benchmarks.job import Job
from benchmarks.plan import Plan
from tests.benchmarks.test_sections import result


def record(job: Job, **found: Any) -> dict[str, Any]:
    return {"job": asdict(job), "result": found}


def run(who: str, round_: int, seconds: float, peak: float, *, threads: int = 2, **others: Any) -> dict[str, Any]:
    job = Job(who=who, repeat=round_, threads=threads, statistics=others.pop("statistics", ()))
    return record(replace(job, precision=others.pop("precision", "32-true")), **result(seconds, peak, **others))


def rows(*records: dict[str, Any]) -> list[dict[str, str]]:
    return [dict(zip(SPEED, row, strict=True)) for row in rows_of(records)]


ROUNDS = [(1.0, 10.0, 0.5), (2.0, 10.0, 1.0), (4.0, 10.0, 1.0)]


def test_ratios_are_of_runs_of_one_round_and_medians_of_rounds() -> None:
    records = [record(Job(kind="rate"), rate=4e9)]
    for round_, seconds in enumerate(ROUNDS):
        records.append(run("ours", round_, seconds[0], 1024))
        records.append(run("trl", round_, seconds[1], 2048 if round_ else 4096, tokens=9000))
        records.append(run("ours", round_, 2 * seconds[0], 1024, statistics=("entropy",)))
        records.append(run("ours", 1000 + round_, seconds[2], 1024))
    ours, trl, entropy, cached, floor = rows(*records)
    assert [row[""] for row in (ours, trl, entropy, cached)] == ["ours", "TRL", WITH_ENTROPY, CACHED]
    assert ours["examples/s"] == "32 (16–64)"
    assert trl["examples/s"] == "6.4 (6.4–6.4)"
    assert trl["ours is faster"] == "5 × (2.5–10)"
    assert trl["with the reference cached"] == "10 × (10–20)"
    assert trl["ours takes"] == "50%"
    assert (trl["tokens fed"], trl["× needed"]) == ("9.0 k", "3")
    assert {row["ours is faster"] for row in (ours, entropy, cached)} == {""}
    assert floor["examples/s"] == "128"  # 64 in 2e9 / 4e9 s
    assert floor["ours is faster"] == "0.25 ×"


def test_a_round_that_a_contestant_lacks_is_no_ratio() -> None:
    _, trl = rows(run("ours", 0, 1.0, 1024), run("trl", 1, 9.0, 1024), run("trl", 0, 3.0, 1024))
    assert trl["ours is faster"] == "3 ×"


def test_with_one_thread_cpu_seconds_count() -> None:
    (ours,) = rows(run("ours", 0, 1.0, 1024, threads=1))
    assert ours["examples/s"] == "6.4"  # 64 in 10 CPU seconds


@pytest.mark.parametrize(
    ("losses", "precision", "said"),
    [
        ((0.5, 0.42), "32-true", "2e-02"),
        ((0.501, 0.4), "32-true", "1e-03 (the first already)"),
        ((0.501, 0.4), "bf16-mixed", "1e-03"),
        ((0.5, 0.4), "32-true", "0e+00"),
    ],
)
def test_losses_that_differ_are_told(losses: tuple[float, float], precision: str, said: str) -> None:
    both = (
        run(who, 0, 1, 1, precision=precision, losses=own) for who, own in (("ours", (0.5, 0.4)), ("plain", losses))
    )
    _, row = rows(*both)
    assert row[SPEED[-1]] == said


def test_a_contest_without_us_has_no_ratios() -> None:
    (row,) = rows_of([run("plain", 0, 2.0, 1024), record(Job(kind="rate"), rate=1.0)])
    assert row[3:8] == ["32", "", "", "1.0", ""]


def test_memory_is_counted_and_beyond_what_the_process_had() -> None:
    records = [record(Job(kind="saved"), state_mb=1000.0, saved_mb=500.0)]
    for who, peak in (("ours", 2100.0), ("trl", 4100.0)):
        records.append(record(Job(who=who), peak_mb=peak, before_mb=100.0))
    records.append(record(Job(who="trl", loss="dpo"), peak_mb=9e9, before_mb=0.0))
    (row,) = memory_rows(records)
    assert dict(zip(MEMORY, row, strict=True)) == {
        "loss": "kto",
        "precision": "32-true",
        "weights, gradients, moments": "1,000",
        "kept for backward": "500",
        "together": "1,500",
        "ours": "2,000",
        "TRL": "4,000",
    }


class Made:
    """A runner whose results are all alike; a contestant that is in ``fails`` has none."""

    code = ""

    def __init__(self, *fails: str) -> None:
        self.fails, self.jobs, self.records = fails, list[Job](), list[dict[str, Any]]()

    def run(self, job: Job) -> dict[str, Any] | None:
        self.jobs.append(job)
        if job.who in self.fails:
            return None
        found = result(2.0, 1024) | {"rate": 1e9, "before_mb": 1.0, "state_mb": 1.0, "saved_mb": 1.0}
        self.records.append({"job": asdict(job), "result": found})
        return found


def plan(tmp_path: Path, runner: Made) -> Plan:
    asked: dict[str, Any] = {"losses": ("kto", "sft"), "precisions": ("32-true",), "peers": ("trl", "plain")}
    return Plan(base=Job(), **asked, repeats=2, folder=tmp_path, runner=runner)  # type: ignore[arg-type]


def test_contestants_take_turns_and_the_last_run_of_ours_finds_the_cache_of_the_first(tmp_path: Path) -> None:
    runner = Made()
    speed(plan(tmp_path, runner))
    turns = [job for job in runner.jobs if job.kind == "train"]
    of_kto = [contestant(asdict(job)) for job in turns if job.loss == "kto"]
    assert of_kto == 2 * ["ours", "TRL", "plain loop", WITH_ENTROPY, CACHED]
    # Rounds are over all losses, so that a run that is stopped has whole rounds.
    assert [job.repeat % 1000 for job in turns] == sorted(job.repeat % 1000 for job in turns)
    assert {job.who for job in turns if job.loss == "sft"} == {"ours"}  # the others have no such loss
    caches = [job.cache for job in turns if job.loss == "kto" and job.who == "ours"]
    assert [caches.index(cache) for cache in caches] == [0, 1, 0, 3, 4, 3]
    assert len({job.name("") for job in turns}) == len(turns)


def test_what_failed_leaves_a_gap(tmp_path: Path) -> None:
    text = speed(plan(tmp_path, Made("trl")))
    assert "| kto | 32-true | plain loop |" in text
    assert "| TRL |" not in text.partition("*Kept for backward*")[0].partition("| loss | precision | weights")[0]
