"""Every promise of the threat model names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "develop" / "threat-model.md"
ROWS = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "][1:]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def unnamed(row: list[str]) -> list[str]:
    """What is wrong with a row: no test, or tests that do not exist."""
    tests = NAMED.findall(row[-1])
    if len(row) != 3 or not tests or len(tests) != row[-1].count("::"):
        return [f"{row[0]}: names no test"]
    sources = {file: ROOT.joinpath(file) for file, _ in tests}
    texts = {file: path.read_text(encoding="utf-8") if path.is_file() else "" for file, path in sources.items()}
    return [f"{file}::{name}" for file, name in tests if f"\ndef {name}(" not in texts[file]]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_row_names_tests_that_exist(row: list[str]) -> None:
    assert unnamed(row) == []


def test_a_row_without_its_test_is_noticed() -> None:
    assert len(ROWS) > 15
    here = "tests/docs/test_threat_model.py"
    assert unnamed(["input", "promise", f"`{here}::test_every_row_names_tests_that_exist`"]) == []
    assert unnamed(["input", "promise", f"`{here}::test_x`"]) == [f"{here}::test_x"]
    assert unnamed(["input", "promise", "none"]) == ["input: names no test"]
    assert unnamed(["input", "promise"]) == ["input: names no test"]
