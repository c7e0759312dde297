"""A short run of the fuzzer, always the same answers."""

from pathlib import Path

import pytest

from tests.fuzz_judge import fuzz


@pytest.mark.long
def test_mutated_answers_are_answers_or_counted_failures(tmp_path: Path) -> None:
    outcomes = fuzz(100, 0, tmp_path)
    assert outcomes.total() == 100
    # At least half get as far as an answer.
    assert outcomes["scored"] + outcomes["unscored"] >= 50
    assert outcomes["unscored"] > 0
    assert outcomes["failed"] > 10
