"""Markdown, by hand."""

import pytest

from benchmarks.table import number, table


def test_a_table() -> None:
    assert table(("a", "b"), [["1", "x|y"], ["", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n|  | 2 |"


def test_a_row_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 cells in a row, found 1: x"):
        table(("a", "b"), [["x"]])


@pytest.mark.parametrize(
    ("value", "text"), [(1.2345, "1.23"), (1234.5, "1234"), (0.05678, "0.0568"), (12.0, "12"), (100.2, "100")]
)
def test_three_digits(value: float, text: str) -> None:
    assert number(value) == text
