"""Checks of numbers that a user sets; the error names the configuration key."""

import math
from collections.abc import Collection, Mapping
from typing import TypeGuard


def check_whole(key: str, value: object, least: int, most: int | None = None, *, null: bool = False) -> None:
    """Raise ``ValueError`` unless the value is a whole number from ``least`` to ``most`` (or None, if ``null``).

    ``True`` and 1.0 are refused: they equal a whole number in Python, but a user who wrote them meant something else.
    """
    if value is None and null:
        return
    if type(value) is not int or value < least or (most is not None and value > most):
        end = "on" if most is None else f"to {most}"
        raise ValueError(f"{key}: expected a whole number from {least} {end}{' or null' * null}, found {value!r}")


def check_number(key: str, value: object, least: float = 0.0, *, null: bool = False) -> None:
    """Raise ``ValueError`` unless the value is a finite number from ``least`` on (or None, if ``null``)."""
    if value is None and null:
        return
    if not (is_number(value) and least <= value < math.inf):
        raise ValueError(f"{key}: expected a number from {least:g} on{' or null' * null}, found {value!r}")


def check_mapping(key: str, value: object) -> None:
    """Raise ``ValueError`` unless the value is a mapping or None."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{key}: expected names with values, found {value!r}")


def check_share(key: str, value: object) -> None:
    """Raise ``ValueError`` unless the value is a number above 0 and up to 1."""
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"{key}: expected a share in (0, 1], found {value!r}")


def check_choice(key: str, value: object, options: Collection[str]) -> None:
    """Raise ``ValueError`` unless the value is one of the options."""
    if value not in list(options):  # a list, as a value of a saved configuration may have no hash
        raise ValueError(f"{key}: expected one of {', '.join(options)}; found {value!r}")


def is_number(value: object) -> TypeGuard[float]:
    """Return whether the value is an int or a float. Booleans do not count, although they are ints in Python."""
    return isinstance(value, int | float) and not isinstance(value, bool)
