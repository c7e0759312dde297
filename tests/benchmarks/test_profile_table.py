"""Parts that add up to a step."""

from typing import Any

import pytest

from benchmarks.profile_table import (
    BETWEEN,
    MEMORY,
    PROFILE,
    REST,
    WAITING,
    parts,
    rows_of,
    section,
    with_waiting,
)

RESULT: dict[str, Any] = {
    "threads": 1,
    "layers": 2,
    "seconds": {"first": 11.0, "measured": 9.0, "again": 10.0},
    "causes": {
        "products": {"calls": 10, "seconds": 6.0, "faults": 100, "operations": 1.0, "moved": 1.0},
        "conversions": {"calls": 30, "seconds": 0.5, "faults": 0, "operations": 0.0, "moved": 1.0},
    },
    "between": {"forward": 1.5, "backward": 1.0, "rest": 0.25},
    "faults": 300,
    "fault_seconds": 0.001,
    "views": 20,
    "names": {"head: mm": 1.0, "forward: mm": 2.0, "head: mul": 4.0},
    "overhead": {"operation": 0.01, "view": 0.005},
    "roofline": {"least": {"products": 4.0, "conversions": 0.5}, "rate": 1e9, "bandwidth": 1e9},
}


def test_parts_are_without_faults_and_without_what_measuring_added() -> None:
    found = parts(RESULT)
    assert found["products"] == pytest.approx(5.9)
    # 2.5 s, less 40 · 0.01 + 20 · 0.005 for measuring, less 200 faults outside of operations.
    assert found[BETWEEN] == pytest.approx(1.8)
    assert found[MEMORY] == pytest.approx(0.3)
    assert found[REST] == 0.25


def test_rows_add_up_to_a_step_and_say_what_is_unexplained() -> None:
    rows = [dict(zip(PROFILE, row, strict=True)) for row in rows_of(RESULT, parts(RESULT))]
    by_name = {row["part of a step"]: row for row in rows}
    assert by_name["unexplained"]["s"] == "1.250"  # 10 − 5.9 − 0.5 − 1.8 − 0.25 − 0.3
    assert sum(float(row["s"]) for row in rows[:-2]) == pytest.approx(10)
    assert by_name["**step**"]["least, s"] == "4.500 (45%)"
    assert by_name["first pass"]["s"] == "+1.000"
    assert by_name["products"]["ms a layer"] == "2450.0"  # (5.9 − 1) / 2
    assert by_name[BETWEEN]["least, s"] == by_name[BETWEEN]["ms a layer"] == ""


def test_several_threads_lose_what_operations_take_longer_than_their_share() -> None:
    alone = {"products": 6.0, "conversions": 1.0, BETWEEN: 0.5}
    together = {"products": 3.5, "conversions": 0.5, BETWEEN: 0.625}
    assert with_waiting(alone, together, 2) == {"products": 3.0, "conversions": 0.5, BETWEEN: 0.625, WAITING: 0.5}


def test_a_case_that_failed_is_left_out() -> None:
    text = section([("kto", RESULT, None), ("dpo", None, None), ("ipo", RESULT, RESULT | {"threads": 2})])
    assert "**kto, one thread** (1 GFLOP/s, 1 GB/s)" in text
    assert "dpo" not in text
    assert "**ipo, 2 threads**" in text
