"""Formulas on tensors, against Python's own arithmetic and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from halos.formulas.grammar import parse
from halos.formulas.interpreter import SMOOTHED, power
from halos.formulas.value import value_function

POINTS = [-7.0, -1.0, -0.3, 0.0, 0.2, 1.0, 4.0]


def gains(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(POINTS, dtype=dtype)


def softplus(u: float) -> float:
    return math.log1p(math.exp(u))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 - 2*u + u/4", lambda u: 1 - 2 * u + u / 4),
        ("-u**2", lambda u: -(u**2)),
        ("(-u)**3 - +u", lambda u: -(u**3) - u),
        ("2**-2 * u", lambda u: u / 4),
        ("2 - 3 - u", lambda u: -1 - u),
        ("8 / 4 / 2 * u", lambda u: u),
        ("exp(u)", math.exp),
        ("log(1 + u*u)", lambda u: math.log(1 + u * u)),
        ("log1p(u*u)", lambda u: math.log1p(u * u)),
        ("expm1(u)", math.expm1),
        ("sigmoid(u)", lambda u: 1 / (1 + math.exp(-u))),
        ("log_sigmoid(u)", lambda u: -softplus(-u)),
        ("logsigmoid(u)", lambda u: -softplus(-u)),
        ("tanh(u)", math.tanh),
        ("softplus(u)", softplus),
        ("relu(u)", lambda u: max(u, 0.0)),
        ("abs(u)", abs),
        ("sqrt(4 + u*u)", lambda u: math.sqrt(4 + u * u)),
        ("sign(u)", lambda u: (u > 0) - (u < 0)),
        ("min(u, 1)", lambda u: min(u, 1.0)),
        ("max(u, -1)", lambda u: max(u, -1.0)),
        ("clip(u, -1, 2)", lambda u: min(max(u, -1.0), 2.0)),
        ("where(u < 1, u, 1)", lambda u: u if u < 1 else 1),
        ("where(u <= 1, 0*u, u)", lambda u: 0 if u <= 1 else u),
        ("where(u >= 1, 5, u)", lambda u: 5 if u >= 1 else u),
        ("where(0 > u, -u, 2*u)", lambda u: -u if u < 0 else 2 * u),
        ("where(u > 0, where(u > 1, log(u), u - 1), -sqrt(-4*u))",
         lambda u: math.log(u) if u > 1 else u - 1 if u > 0 else -math.sqrt(-4 * u)),
    ],
)  # fmt: skip
def test_values_are_those_of_arithmetic(text: str, expected: Callable[[float], float]) -> None:
    found = value_function(text, {})(gains())
    torch.testing.assert_close(found, torch.tensor([float(expected(u)) for u in POINTS]).double(), rtol=1e-6, atol=1e-7)
    exact = torch.tensor([float(expected(u)) for u in POINTS], dtype=torch.float64)
    torch.testing.assert_close(found, exact, rtol=1e-14, atol=1e-15)


def test_parameters_enter_where_the_formula_reads_them() -> None:
    value = value_function("where(u > 0, (beta*u)**alpha, loss_aversion*u)", {"beta": 2.0, "alpha": 3.0})
    assert value.parameters == {"beta": 2.0, "alpha": 3.0, "loss_aversion": 2.25}
    expected = [(2 * u) ** 3 if u > 0 else 2.25 * u for u in POINTS]
    torch.testing.assert_close(value(gains()), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.88])
def test_a_power_below_1_is_exact_from_epsilon_on_and_smooth_below(p: float) -> None:
    x = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.0 + 1e-9, 3.0, 1e6], dtype=torch.float64) * SMOOTHED
    x.requires_grad_()
    y = power(x, p)
    (slope,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(y[3:], x[3:] ** p, rtol=1e-14, atol=0)
    torch.testing.assert_close(slope[3:], p * x[3:] ** (p - 1), rtol=1e-8, atol=0)
    # By hand: the parabola's value at ε/2 is ε^p ((2 − p)/2 − (1 − p)/4), its slope at 0 (2 − p) ε^(p − 1).
    assert float(y[0]) == 0.0
    assert float(y[2]) == pytest.approx(1e-3**p * ((2 - p) / 2 - (1 - p) / 4), rel=1e-14)
    assert float(slope[0]) == pytest.approx((2 - p) * 1e-3 ** (p - 1), rel=1e-14)
    assert (y.diff() > 0).all()
    assert (slope.diff() < 1e-12).all()  # concave, so the slope falls


@pytest.mark.parametrize("p", [-1.0, 0.0, 1.0, 1.5, 2.0, 3.0])
def test_other_powers_are_plain(p: float) -> None:
    x = torch.tensor([1e-4, 0.5, 2.0], dtype=torch.float64)
    assert power(x, p).tolist() == (x**p).tolist()


def test_a_smoothed_power_of_a_negative_number_is_no_number() -> None:
    assert power(torch.tensor([-1e-9, -1.0]), 0.5).isnan().all()


TEXTS = (
    "where(u>0, u**0.88, -2.25*(-u)**0.88)",
    "where(u >= 0, u**0.5, -2*(-u)**0.5)",
    "where(u > 0, sqrt(u), -sqrt(-u))",
    "where(u > 0, log(u + 1), u/(1 - u))",
    "where(u > 1, log(log(u) + 1), where(u < -1, -1/sqrt(-u), u))",
    "where(u > 0, where(u < 1, u, 2 - 1/u), -2*exp(-u/(u - 1)) + 2)",
    "where(u > 0, where(u < 2, log(u), u), u)",
    "abs(u)**0.88",
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("text", TEXTS)
def test_slopes_are_finite_everywhere_step_0_included(text: str, dtype: torch.dtype) -> None:
    value = value_function(text, {})
    u = torch.tensor([-80.0, -1.0, -1e-3, -1e-6, -0.0, 0.0, 1e-30, 1e-6, 1e-3, 1.0, 80.0], dtype=dtype)
    assert value(u).isfinite().all()
    assert value.slope(u).isfinite().all()
    assert value(u).dtype == value.slope(u).dtype == dtype
    smooth = gains()[gains() != 0] if "abs" in text else gains()[gains().abs() != 1]
    smooth = smooth[smooth != 0]
    numeric = (value(smooth + 1e-6) - value(smooth - 1e-6)) / 2e-6
    torch.testing.assert_close(value.slope(smooth), numeric, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_the_slope_of_the_kahneman_tversky_value_at_step_0(dtype: torch.dtype, rtol: float) -> None:
    slope = value_function(TEXTS[0], {}).slope(torch.zeros(1, dtype=dtype))
    # u = 0 takes the branch of losses: 2.25 (2 − 0.88) ε^(0.88 − 1).
    expected = torch.tensor([2.25 * 1.12 * 1e-3**-0.12], dtype=dtype)
    torch.testing.assert_close(slope, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("u", [-2.0, 0.0, 2.0])
def test_the_branch_that_is_not_taken_has_no_part_in_the_gradient(u: float) -> None:
    # Its argument is 0, negative or infinite there: without safe inputs the slope would be NaN.
    text = "where(u > 1, log(u - 1), where(u < -1, sqrt(-1 - u), exp(u)/1 + u))"
    point = torch.tensor([u], dtype=torch.float64)
    slope = value_function(text, {}).slope(point)
    expected = 1 / (u - 1) if u > 1 else -0.5 / math.sqrt(-1 - u) if u < -1 else math.exp(u) + 1
    assert float(slope) == pytest.approx(expected, rel=1e-14)


def test_a_parsed_formula_is_not_changed_by_its_use() -> None:
    tree = parse("beta*u")
    first, second = (value_function("beta*u", {"beta": beta}) for beta in (1.0, 2.0))
    assert float(first(torch.ones(()))), float(second(torch.ones(()))) == (1.0, 2.0)
    assert tree is not first.tree
