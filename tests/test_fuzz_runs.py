"""A short run of the fuzzer, always the same run folders."""

from pathlib import Path

import pytest

from tests.fuzz_runs import fuzz


@pytest.mark.long
def test_mutated_runs_are_read_or_refused_in_one_line_and_run_nothing(tmp_path: Path) -> None:
    outcomes = fuzz(25, 0, tmp_path)
    commands = ("compare", "evaluate", "export")
    done, refused = ([outcomes[f"{command}: {end}"] for command in commands] for end in ("done", "refused"))
    # At least half get as far as their result.
    assert sum(done) >= sum(refused)
    assert min(done + refused) > 0
    assert outcomes["join: refused"] > 0
    assert outcomes["show: done"] > 0
