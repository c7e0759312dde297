"""The first process is known with and without Lightning."""

import os
import subprocess
import sys

import pytest
from lightning.pytorch.utilities import rank_zero_only

from halos.processes.first import RANKS, on_first_process


@pytest.mark.long
@pytest.mark.parametrize("imported", ["os", pytest.param("lightning.fabric.utilities", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("ranks", "first"),
    [({}, True), ({"LOCAL_RANK": "0"}, True), ({"LOCAL_RANK": "1"}, False), ({"RANK": "2", "LOCAL_RANK": "0"}, False)],
)
def test_a_rank_is_known_from_its_launcher(imported: str, ranks: dict[str, str], first: bool) -> None:
    code = f"import {imported}; from halos.processes.first import on_first_process; print(on_first_process())"
    environment = {name: value for name, value in os.environ.items() if name not in RANKS} | ranks
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{first}\n"


def test_what_lightnings_strategy_found_out_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    assert not on_first_process()
