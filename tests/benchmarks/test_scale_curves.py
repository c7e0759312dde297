"""The parts whose cost grows with the data, measured on few of them."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import scale_curves
from halos.data.batches import reference_entries


@pytest.mark.parametrize("part", ["index", "columns", "partners", "order", "plan"])
def test_each_part_is_measured(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_entries, "IN_MEMORY", 500)
    monkeypatch.setattr(scale_curves, "BLOCK", 100)
    monkeypatch.setattr(scale_curves, "LOOKUPS", 10)
    assert scale_curves.PARTS[part](tmp_path, 2000) > 0
    notes = "".join(file.read_text() for file in tmp_path.glob("*.txt"))
    if part == "index":
        assert notes.startswith("2,000 entries; ")
    if part == "plan":
        # A forward has 4,096 tokens; two completions of 100 tokens share each prompt of 100 only by chance.
        assert notes.endswith("20.0 completions in a forward")


def test_the_table_has_two_rows_of_each_prompt(tmp_path: Path) -> None:
    scale_curves._write_table(tmp_path / "rows.arrow", 101, tokens=7)
    table = scale_curves._open_table(tmp_path / "rows.arrow")
    assert table.groups.tolist() == [n // 2 for n in range(101)]
    assert {(len(row.prompt), len(row.branches), len(row.branches[0])) for row in table} == {(7, 1, 7)}
    assert np.bincount(table.labels).tolist() == [51, 50]
