"""Checks of objectives' parameters, made when an objective is built and before any model is loaded."""

from __future__ import annotations

import math
from typing import Literal


def require_between(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """The value as a float, if it is a number in [low, high) (or in (low, high)); a ``ValueError`` naming it if not."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (low < value if open_low else low <= value) or not value < high:
        span = f"{'(' if open_low else '['}{low:g}, {high:g})"
        raise ValueError(f"loss.{name}: expected a number in {span}, found {value!r}")
    return float(value)


def require_positive(name: str, value: float) -> float:
    """The value as a float, if it is a number above 0."""
    return require_between(name, value, 0.0, open_low=True)


def require_share(name: str, value: float) -> float:
    """The value as a float, if it is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"loss.{name}: expected a number in [0, 1], found {value!r}")
    return float(value)


def require_weight(name: str, value: float | Literal["auto"]) -> float | Literal["auto"]:
    """``auto``, or the value as a float if it is a number from 0 on."""
    return "auto" if value == "auto" else require_between(name, value, 0.0)
