"""Checks of the objectives' parameters, in their constructors and so before any model is loaded."""

from __future__ import annotations

import math
from typing import Literal

from halos.checks import is_number


def require_between(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """The value as a float, checked to be in [low, high), or in (low, high) if ``open_low``.

    Raises:
        ValueError: naming the key ``loss.{name}``, for another number or no number.
    """
    try:
        number = float(value) if is_number(value) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.nan
    if not (low < number if open_low else low <= number) or not number < high:
        span = f"{'(' if open_low else '['}{low:g}, {high:g})"
        raise ValueError(f"loss.{name}: expected a number in {span}, found {value!r}")
    return number


def require_positive(name: str, value: float) -> float:
    """The value as a float, checked to be above 0; see :func:`require_between`."""
    return require_between(name, value, 0.0, open_low=True)


def require_fraction(name: str, value: float) -> float:
    """The value as a float, checked to be in [0, 1]; see :func:`require_between`."""
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"loss.{name}: expected a number in [0, 1], found {value!r}")
    return float(value)


def require_weight(name: str, value: float | Literal["auto"]) -> float | Literal["auto"]:
    """``auto``, or the value as a float, checked to be 0 or more; see :func:`require_between`."""
    return "auto" if value == "auto" else require_between(name, value, 0.0)
