"""The parameters of all losses: an error names the key, and a margin that counts is asked for."""

from __future__ import annotations

import inspect
import math
import re

import pytest

from tests.loop_runs import OBJECTIVES

KINDS = [kind for kind in OBJECTIVES if kind.__name__ != "Mix"]  # whose weights are those of its parts
NUMBERS = [
    pytest.param(kind, name, id=f"{kind.__name__}.{name}")
    for kind in KINDS
    for name, parameter in inspect.signature(kind).parameters.items()
    if "float" in str(parameter.annotation)
]
WITH_MARGINS = [kind for kind in KINDS if "margin_weight" in inspect.signature(kind).parameters]


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_what_is_no_number_is_refused_by_its_key(kind: type, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^loss\.{re.escape(name)}: expected .*, found nan"):
        kind(None, **{name: math.nan})


@pytest.mark.parametrize("kind", WITH_MARGINS)
def test_margins_are_asked_for_where_they_count(kind: type) -> None:
    assert kind(None, margin_weight=0.5).needs.margins
    assert not kind(None, margin_weight=0.0).needs.margins
