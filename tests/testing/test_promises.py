"""How the kit compares numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from halos.objectives import Output
from halos.testing.examples import Result
from halos.testing.promises import Violation, agree, agree_on_means, finite


@pytest.mark.parametrize(
    ("expected", "found", "tolerance", "fine"),
    [
        (1.0, 1.0 + 1e-12, 1e-9, True),
        (1.0, 1.0 + 1e-7, 1e-9, False),
        (torch.ones(2), torch.ones(3), 1.0, False),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), 1e-9, True),
        (1.0, float("nan"), 1e9, False),
        (0.0, 0.0, 0.0, True),
        (0.0, 1e-300, 0.0, False),
    ],
)
def test_agreement(expected: Any, found: Any, tolerance: float, fine: bool) -> None:
    if fine:
        agree("it", expected, found, tolerance=tolerance)
    else:
        with pytest.raises(Violation, match=r"^it: expected .*, found "):
            agree("it", expected, found, tolerance=tolerance)


def answer(*, loss: float = 0.5, gradient: float = 1.0, **means: tuple[float, float]) -> Result:
    return Result(torch.tensor(loss), {"a": torch.tensor([gradient])}, Output({}), means)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (answer(loss=float("nan")), "^loss: expected a finite number, found nan"),
        (answer(gradient=float("inf")), "^gradient of a: expected finite numbers"),
        (answer(z0=(float("nan"), 0.0)), "^metric z0: expected a finite sum and count"),
    ],
)
def test_what_is_not_finite_is_named(found: Result, message: str) -> None:
    finite(answer(z0=(0.0, 0.0)))
    with pytest.raises(Violation, match=message):
        finite(found)


def test_sums_and_counts_add_up() -> None:
    whole = answer(z0=(6.0, 3.0), other=(0.0, 0.0))
    agree_on_means(whole, [answer(z0=(5.0, 1.0), other=(0.0, 0.0)), answer(z0=(1.0, 2.0), other=(0.0, 0.0))])
    with pytest.raises(Violation, match=r"^metric z0: expected 2, found 3"):
        agree_on_means(whole, [answer(z0=(9.0, 3.0), other=(0.0, 0.0))])
    with pytest.raises(Violation, match=r"^metric z0: expected a count of 3\.0, found 0"):
        agree_on_means(whole, [answer(z0=(0.0, 0.0), other=(0.0, 0.0))])
