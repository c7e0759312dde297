"""A short run of the fuzzer, always the same files."""

from pathlib import Path

import pytest

from tests.fuzz_data import fuzz


@pytest.mark.long
def test_mutated_files_load_or_are_refused_on_one_line(tmp_path: Path) -> None:
    outcomes = fuzz(150, 0, tmp_path)
    assert outcomes.total() == 150
    for kind in ("jsonl", "json", "csv", "parquet"):
        assert outcomes[f"{kind} refused"] > 0
        assert outcomes[f"{kind} loaded"] > 0
