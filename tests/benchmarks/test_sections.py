"""From results to the rows of a report."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.job import Job
from benchmarks.plan import Plan
from benchmarks.sections import SWEEP, beyond_weights_mb, draw, profile, sweep


def result(seconds: float, peak: float, losses: tuple[float, ...] = (0.5, 0.4), tokens: int = 3000) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "cpu_seconds": 10 * seconds,
        "peak_mb": peak,
        "losses": list(losses),
        "tokens": tokens,
        "examples": 64,
        "needed_tokens": 3000,
        "operations": 2e9,
    }


def test_memory_beyond_weights_gradients_and_two_moments() -> None:
    assert beyond_weights_mb({"peak_mb": 500.0, "before_mb": 100.0, "parameters": 2**20}) == 500 - 100 - 16


def test_curves_are_drawn_for_every_size_that_was_varied(tmp_path: Path) -> None:
    draw({"prompt": [(32, 0.1, 0.2), (64, 0.2, 0.4)], "vocabulary": []}, tmp_path / "costs.png")
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")


class Made:
    """A runner whose results are all alike; a job that is in ``fails`` has none."""

    code = ""

    def __init__(self, *fails: str) -> None:
        self.fails, self.jobs = fails, list[Job]()

    def run(self, job: Job) -> dict[str, Any] | None:
        self.jobs.append(job)
        return None if job.who in self.fails else result(2.0, 1024) | {"reference_seconds": 0.5, "rate": 1e9}


def plan(tmp_path: Path, runner: Made) -> Plan:
    asked: dict[str, Any] = {"losses": ("kto", "sft"), "precisions": ("32-true",), "peers": ("trl", "plain")}
    return Plan(base=Job(), **asked, repeats=2, folder=tmp_path, runner=runner)  # type: ignore[arg-type]


def test_a_sweep_shares_one_cache_and_adds_up(tmp_path: Path) -> None:
    runner = Made()
    text = sweep(plan(tmp_path, runner))
    assert {job.loss for job in runner.jobs if job.who == "ours"} == set(SWEEP)
    assert len({job.cache for job in runner.jobs if job.who == "ours"}) == 1
    assert f"| 32-true | **total** | {2.0 * len(SWEEP)} | {2.0 * len(SWEEP)} |  |" in text


def test_what_failed_is_told(tmp_path: Path) -> None:
    assert "failed" in sweep(plan(tmp_path, Made("trl")))


def test_a_profile_is_of_one_thread_and_of_all(tmp_path: Path) -> None:
    runner = Made("ours")
    asked = plan(tmp_path, runner)
    profile(replace(asked, base=replace(asked.base, threads=4)))
    assert [(job.loss, job.threads) for job in runner.jobs] == [("kto", 1), ("kto", 4), ("sft", 1), ("sft", 4)]
