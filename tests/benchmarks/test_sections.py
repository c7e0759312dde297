"""From results to the rows of a report."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.job import Job
from benchmarks.sections import CACHED, SPEED, SWEEP, Plan, beyond_weights_mb, draw, speed, speed_rows, sweep


def result(seconds: float, peak: float, losses: tuple[float, ...] = (0.5, 0.4), tokens: int = 3000) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "peak_mb": peak,
        "losses": list(losses),
        "tokens": tokens,
        "examples": 64,
        "needed_tokens": 3000,
        "operations": 2e9,
    }


def test_ratios_are_of_runs_of_one_round_and_medians_of_rounds() -> None:
    found = {
        "ours": [result(1.0, 1024), result(2.0, 1024), result(4.0, 1024)],
        "trl": [result(10.0, 2048, tokens=9000), result(10.0, 2048, tokens=9000), result(10.0, 4096, tokens=9000)],
        CACHED: [result(0.5, 1024), result(1.0, 1024), result(1.0, 1024)],
    }
    rows = [dict(zip(SPEED, row, strict=True)) for row in speed_rows(Job(loss="kto"), found, {"rate": 4e9})]
    ours, trl, cached, floor = rows
    assert ours["examples/s"] == "32"  # the median of 64, 32 and 16
    assert trl["examples/s"] == "6.4"
    assert trl["ours is faster"] == "5 ×"  # the median of 10, 5 and 2.5
    assert trl["with the reference cached"] == "10 ×"
    assert trl["ours takes"] == "50%"
    assert (trl["tokens fed"], trl["× needed"]) == ("9.0 k", "3")
    assert (ours["ours is faster"], cached["ours is faster"]) == ("", "")
    assert floor["examples/s"] == "128"  # 64 in 2e9 / 4e9 s
    assert floor["ours is faster"] == "0.25 ×"


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
    found = {"ours": [result(1, 1)], "plain": [result(1, 1, losses)]}
    _, row = speed_rows(Job(precision=precision), found, None)
    assert row[-1] == said


def test_a_contest_without_us_has_no_ratios() -> None:
    (row,) = speed_rows(Job(), {"plain": [result(2.0, 1024)]}, {"rate": 1.0})
    assert row[3:8] == ["32", "", "", "1.0", ""]


def test_memory_beyond_weights_gradients_and_two_moments() -> None:
    assert beyond_weights_mb({"peak_mb": 500.0, "before_mb": 100.0, "parameters": 2**20}) == 500 - 100 - 16


def test_curves_are_drawn_for_every_size_that_was_varied(tmp_path: Path) -> None:
    draw({"prompt": [(32, 0.1, 0.2), (64, 0.2, 0.4)], "vocabulary": []}, tmp_path / "costs.png")
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")


class Made:
    """A runner whose results are all alike; a job that is in ``fails`` has none."""

    def __init__(self, *fails: str) -> None:
        self.fails, self.jobs = fails, list[Job]()

    def run(self, job: Job) -> dict[str, Any] | None:
        self.jobs.append(job)
        return None if job.who in self.fails else result(2.0, 1024) | {"reference_seconds": 0.5, "rate": 1e9}


def plan(tmp_path: Path, runner: Made) -> Plan:
    asked: dict[str, Any] = {"losses": ("kto", "sft"), "precisions": ("32-true",), "peers": ("trl", "plain")}
    return Plan(base=Job(), **asked, repeats=2, folder=tmp_path, runner=runner)  # type: ignore[arg-type]


def test_contestants_take_turns_and_the_second_run_of_ours_finds_the_cache_of_the_first(tmp_path: Path) -> None:
    runner = Made()
    speed(plan(tmp_path, runner))
    turns = [(job.who, job.loss, job.repeat % 1000) for job in runner.jobs if job.kind == "train"]
    of_kto = [("ours", 0), ("trl", 0), ("plain", 0), ("ours", 0), ("ours", 1), ("trl", 1), ("plain", 1), ("ours", 1)]
    assert [(who, repeat) for who, loss, repeat in turns if loss == "kto"] == of_kto
    assert {who for who, loss, _ in turns if loss == "sft"} == {"ours"}  # the others have no such loss
    caches = [job.cache for job in runner.jobs if job.loss == "kto" and job.who == "ours" and job.kind == "train"]
    assert caches[0] == caches[1] != caches[2] == caches[3]
    assert len({job.name("") for job in runner.jobs if job.kind == "train"}) == len(turns)


def test_a_sweep_shares_one_cache_and_adds_up(tmp_path: Path) -> None:
    runner = Made()
    text = sweep(plan(tmp_path, runner))
    assert {job.loss for job in runner.jobs if job.who == "ours"} == set(SWEEP)
    assert len({job.cache for job in runner.jobs if job.who == "ours"}) == 1
    assert f"| 32-true | **total** | {2.0 * len(SWEEP)} | {2.0 * len(SWEEP)} |  |" in text


def test_what_failed_leaves_a_gap_and_the_rest_is_told(tmp_path: Path) -> None:
    assert "| kto | 32-true | plain |" in (text := speed(plan(tmp_path, Made("trl"))))
    assert "trl" not in text
    assert "failed" in sweep(plan(tmp_path, Made("trl")))
