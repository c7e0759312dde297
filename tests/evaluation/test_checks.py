"""Settings are refused for what they are, also by their type."""

from typing import Any

import pytest

from halos.evaluation.checks import check_number, check_place, check_whole


@pytest.mark.parametrize("value", [0, 1.0, "1", True, None])
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    check_whole("size", 1, 1)
    check_whole("size", None, 1, null=True)
    with pytest.raises(ValueError, match=r"size: expected a whole number from 1 on, found "):
        check_whole("size", value, 1)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", False, None])
def test_what_is_no_number_is_refused(value: Any) -> None:
    check_number("beta", 0)
    check_number("beta", 0.5)
    with pytest.raises(ValueError, match=r"beta: expected a number from 0 on, found "):
        check_number("beta", value)


@pytest.mark.parametrize(
    ("device", "precision", "said"),
    [
        ("foo", "32-true", "device: expected auto, cpu, cuda or cuda:N, found 'foo'"),
        ("cuda:99", "32-true", "device: expected cpu or one of .* CUDA devices, found 'cuda:99'"),
        ("cpu", "16", "precision: expected one of 32-true, bf16-true; found '16'"),
    ],
)
def test_a_place_that_is_not_here_is_refused(device: str, precision: str, said: str) -> None:
    check_place("auto", "bf16-true")
    with pytest.raises(ValueError, match=said):
        check_place(device, precision)
