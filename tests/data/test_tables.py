"""CSV cells that are too long: refused where they stand, before they take memory."""

import tracemalloc
from pathlib import Path

import pytest

from halos.data import tables
from halos.data.tables import read_csv

LIMIT = 1 << 16


@pytest.fixture(autouse=True)
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LONGEST_CELL", LIMIT)


def test_a_cell_of_the_greatest_length_is_read(tmp_path: Path) -> None:
    file = tmp_path / "long.csv"
    file.write_text(f"prompt,completion\nx,{'y' * LIMIT}\n", encoding="utf-8")
    assert [row for _, row in read_csv(file)] == [{"prompt": "x", "completion": "y" * LIMIT}]


@pytest.mark.parametrize("cell", ["y" * (LIMIT + 1), '"' + "never closed,\n" * 500_000], ids=["long", "open quote"])
def test_a_longer_one_is_refused_in_little_memory(cell: str, tmp_path: Path) -> None:
    file = tmp_path / "long.csv"
    file.write_text(f"prompt,completion\na,b\nx,{cell}\n", encoding="utf-8")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"long\.csv:3: expected cells of at most 65,536 characters, found a long"):
            list(read_csv(file))
        assert tracemalloc.get_traced_memory()[1] < 20 * LIMIT
    finally:
        tracemalloc.stop()
