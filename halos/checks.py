"""Numbers that a user gives, checked by key."""

from __future__ import annotations

import math
from typing import Any


def check_whole(key: str, value: Any, least: int, *, null: bool = False) -> None:
    """Raise ``ValueError`` unless the value is a whole number from ``least`` on (or None, if ``null``)."""
    if value is None and null:
        return
    if type(value) is not int or value < least:
        raise ValueError(f"{key}: expected a whole number from {least} on{' or null' * null}, found {value!r}")


def check_number(key: str, value: Any, least: float = 0.0) -> None:
    """Raise ``ValueError`` unless the value is a number from ``least`` on."""
    if type(value) not in (int, float) or not least <= value < math.inf:
        raise ValueError(f"{key}: expected a number from {least:g} on, found {value!r}")
