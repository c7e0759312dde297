"""Offline and on one thread, like the tests; at the end, a line for each compared quantity: the largest difference
and, for scale, the largest value, over all cases."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from parity.case import SEEDS, Case, Comparison

DIFFERENCES = pytest.StashKey[dict[tuple[str, str], list[Comparison]]]()


@pytest.fixture(params=["padded", "packed"])
def packing(request: pytest.FixtureRequest) -> bool:
    """Both ways in which our batches reach the model."""
    return request.param == "packed"


@pytest.fixture(params=SEEDS)
def case(request: pytest.FixtureRequest, packing: bool, tmp_path: Path) -> Iterator[Case]:
    """A policy that has left its reference, and rows; what is compared on it ends up in the summary."""
    made = Case(seed=request.param, packing=packing, folder=tmp_path)
    yield made
    empty: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    table = request.config.stash.setdefault(DIFFERENCES, empty)
    for found in made.compared:
        table[found.name, found.quantity].append(found)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.section("largest differences from TRL")
    for (name, quantity), found in config.stash.get(DIFFERENCES, {}).items():
        largest, size = max(each.difference for each in found), max(each.size for each in found)
        terminalreporter.write_line(f"{name:20} {quantity:9} {largest:.1e}  of {size:.2g}, {len(found)} cases")
