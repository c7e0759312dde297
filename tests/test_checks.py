"""Settings are refused for what they are, also by their type."""

from typing import Any

import pytest

from halos.checks import check_choice, check_number, check_share, check_whole


@pytest.mark.parametrize("value", [0, 1.0, "1", True, None])
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    check_whole("size", 1, 1)
    check_whole("size", None, 1, null=True)
    with pytest.raises(ValueError, match=r"size: expected a whole number from 1 on, found "):
        check_whole("size", value, 1)


def test_a_whole_number_above_the_most_is_refused() -> None:
    check_whole("size", 5, 1, 5)
    with pytest.raises(ValueError, match=r"^size: expected a whole number from 1 to 5, found 6$"):
        check_whole("size", 6, 1, 5)


@pytest.mark.parametrize("value", ["c", None, [], {}, ["a"]])
def test_what_is_no_choice_is_refused_also_what_has_no_hash(value: Any) -> None:
    for options in (("a", "b"), {"a": 1, "b": 2}, {"a", "b"}):
        check_choice("loss.point", "a", options)
        with pytest.raises(ValueError, match=r"^loss\.point: expected one of .*; found "):
            check_choice("loss.point", value, options)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", False, None])
def test_what_is_no_number_is_refused(value: Any) -> None:
    check_number("beta", 0)
    check_number("beta", 0.5)
    check_number("beta", None, null=True)
    with pytest.raises(ValueError, match=r"beta: expected a number from 0 on, found "):
        check_number("beta", value)


@pytest.mark.parametrize("value", [0, -0.5, 1.5, float("nan"), "1", True, None])
def test_what_is_no_share_is_refused(value: Any) -> None:
    check_share("alpha", 1)
    check_share("alpha", 0.5)
    with pytest.raises(ValueError, match=r"alpha: expected a share in \(0, 1\], found "):
        check_share("alpha", value)
