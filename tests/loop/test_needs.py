"""What a loss needs, united over the parts of a mixture."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from halos.objectives import Needs

FLAGS = [field.name for field in fields(Needs) if field.name != "moves"]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_of_either_is_a_flag_of_the_union(flag: str) -> None:
    nothing: dict[str, Any] = dict.fromkeys(FLAGS, False)
    none, one = Needs(**nothing), Needs(**{**nothing, flag: True})
    assert none | one == one | none == one | one == one
    assert none | none == none


@pytest.mark.parametrize(
    ("one", "other", "union"),
    [(1, 1, 1), (1, 0, 1), (-1, 0, -1), (0, 0, 0), (1, -1, None), (None, 1, None), (None, 0, None)],
)
def test_opposite_pushes_promise_nothing(one: int | None, other: int | None, union: int | None) -> None:
    assert (Needs(moves=(one, 0)) | Needs(moves=(other, 0))).moves == (union, 0)
    assert (Needs(moves=(0, other)) | Needs(moves=(0, one))).moves == (0, union)


def test_needs_do_not_change() -> None:
    needs: Any = Needs()
    with pytest.raises(FrozenInstanceError):
        needs.reference = False
