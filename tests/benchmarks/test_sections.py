"""From results to the rows of a report."""

from typing import Any

import pytest

from benchmarks.job import Job
from benchmarks.sections import CACHED, SPEED, beyond_weights_mb, speed_rows


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
