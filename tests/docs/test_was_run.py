"""The table of what was run where follows from tests and reports, and no other page makes such statements by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from halos.gpu_check.parts import PARTS
from scripts.pages import was_run
from scripts.pages.was_run import row
from tests.docs.blocks import ROOT

BY_HAND = re.compile(
    r"\buntested\b|not (yet )?(been )?(run|tested) on a GPU|no GPU run|never (been )?run on a GPU", re.IGNORECASE
)
FEATURE = {"feature": "x", "cpu": "tests/test_optim.py", "ranks": "tests/test_strategies.py", "gpu": ["flex"]}


def report(state: str, gpus: str = "H200", **others: str) -> dict[str, Any]:
    states = {"flex": state, **others}
    return {"machine": {"GPUs": gpus}, "parts": [{"name": name, "state": states[name]} for name in states]}


def test_cells_follow_from_files_and_markers() -> None:
    assert row(FEATURE, []) == [
        "x",
        "[tested](../../tests/test_optim.py)",
        "[tested](../../tests/test_strategies.py)",
        "written only",
        "–",
        "–",
    ]
    traced = FEATURE | {"traced": "tests/loop/test_meta_device.py", "cluster": None}
    assert row(traced, [])[3:] == ["[traced](../../tests/loop/test_meta_device.py)", "–", "written only"]


def test_cells_follow_from_reports() -> None:
    assert row(FEATURE, [report("passed")])[3] == "tested (H200)"
    assert row(FEATURE, [report("skipped")])[3] == "written only"
    assert row(FEATURE, [report("failed")])[3] == "failed (flex, H200)"
    assert row(FEATURE, [report("skipped"), report("passed", "L40S")])[3] == "tested (L40S)"
    several = FEATURE | {"gpus": ["fsdp"]}
    assert row(several, [report("passed", fsdp="passed")])[4] == "written only"  # one GPU
    assert row(several, [report("passed", "H200, H200", fsdp="passed")])[4] == "tested (H200, H200)"
    assert row(several, [{"machine": {}, "parts": [{"name": "fsdp", "state": "passed"}]}])[4] == "written only"  # a CPU


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"cpu": "tests/gone.py"}, "expected a test file, found tests/gone.py"),
        ({"ranks": "tests/test_optim.py"}, "expected a test file with the marker ranks, found tests/test_optim.py"),
        ({"gpu": ["magic"]}, "expected parts of halos check-gpu, found magic"),
        ({"tpu": "x"}, "expected the keys cluster, cpu, feature, gpu, gpus, ranks, traced, found tpu"),
    ],
)
def test_evidence_that_does_not_exist_is_refused(change: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"x: {error}")):
        row(FEATURE | change, [])


def pages() -> list[Path]:
    generated = ROOT / "docs" / "reference" / "what-was-run.md"
    return [file for file in [*(ROOT / "docs").rglob("*.md"), *(ROOT / "conf").rglob("*.yaml")] if file != generated]


def test_no_other_page_says_what_has_not_been_run() -> None:
    assert len(pages()) > 150
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in pages()
        for match in BY_HAND.finditer(" ".join(file.read_text(encoding="utf-8").split()))
    ]
    assert found == []


def test_every_part_of_the_check_is_evidence_for_a_feature() -> None:
    text = was_run.FEATURES.read_text(encoding="utf-8")
    for_comparison = {"launches", "speed_plain", "speed_trl"}
    assert [part.name for part in PARTS if part.name not in text] == sorted(for_comparison)
