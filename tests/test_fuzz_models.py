"""A short run of the fuzzer, always the same model folders."""

from pathlib import Path

import pytest

from tests.fuzz_models import fuzz


@pytest.mark.long
def test_mutated_models_load_or_are_refused_in_one_line_and_run_nothing(tmp_path: Path) -> None:
    outcomes = fuzz(12, 0, tmp_path)
    # At least half get as far as being read, and some to the end.
    assert outcomes["checked, then refused"] <= 6
    assert outcomes["done"] > 0
