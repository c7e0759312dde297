"""Named value functions, parameters that would have no effect, and formulas without a finite value."""

from __future__ import annotations

import re

import pytest
import torch

from halos.formulas.value import VALUES, value_function

FAR = torch.tensor([-1e4, 1e4], dtype=torch.float64)


@pytest.mark.parametrize("name", VALUES)
def test_the_constant_of_a_name_is_what_the_value_tends_to(name: str) -> None:
    value = value_function(name, {})
    limit = float(value(FAR)[1])
    bounded = abs(limit) < 10
    assert value.constant == pytest.approx(limit if bounded else 0.0, abs=1e-12)


@pytest.mark.parametrize("name", VALUES)
def test_named_values_rise_and_are_0_or_centred_at_the_reference_point(name: str) -> None:
    value = value_function(name, {})
    u = torch.linspace(-20, 20, 201, dtype=torch.float64)
    assert (value.slope(u) >= 0).all()
    assert float(value.slope(torch.zeros(()))) > 0


def test_names_have_the_published_parameters() -> None:
    assert value_function("kahneman_tversky", {}).parameters == {"alpha": 0.88, "loss_aversion": 2.25}
    assert value_function("logistic", {}).parameters == {"beta": 0.1}
    assert value_function("kahneman_tversky", {"alpha": 0.5, "beta": None}).parameters["alpha"] == 0.5


def test_the_formula_in_the_papers_symbols() -> None:
    value = value_function("where(u>0, u**alpha, -loss_aversion*log_sigmoid(-beta*u))", {})
    assert value.symbols == "where(u>0, u^α, −λ·log σ(−β·u))"


@pytest.mark.parametrize(
    ("text", "smoothed"),
    [
        ("u**2", False),
        ("where(u > 0, u**alpha, u)", True),
        ("sqrt(u*u)", True),
        ("u", False),
        ("tanh(sqrt(u*u))", True),
    ],
)
def test_it_says_whether_a_power_is_smoothed(text: str, smoothed: bool) -> None:
    assert value_function(text, {}).smoothed is smoothed


@pytest.mark.parametrize(
    ("text", "parameters", "message"),
    [
        ("kto", {}, "loss.value: expected one of logistic, log_sigmoid, kahneman_tversky, linear, tanh, hinge, "
         "exponential, or a formula in u, found 'kto'; allowed are"),
        ("u", {"beta": 0.1}, "loss.beta: expected null, as loss.value='u' does not read it, found 0.1"),
        ("logistic", {"alpha": 0.1}, "loss.alpha: expected null, as loss.value='sigmoid(beta*u)' does not read it"),
        ("log(u)", {}, "loss.value: expected a finite value at u = -50, found nan of 'log(u)'; write where(u > 0, "),
        ("1/u", {}, "loss.value: expected a finite value at u = 0, found inf of '1/u'"),
        ("exp(u*u)", {}, "loss.value: expected a finite value at u = -50, found inf"),
        ("sqrt(abs(u)) + sqrt(u)", {}, "loss.value: expected a finite value at u = -50, found nan"),
        ("u**50", {}, "loss.value: expected exponents from -16 to 16, found 50"),
        ("u**(9**9**9)", {}, "loss.value: expected exponents from -16 to 16, found 3.8742e+08"),
        ("u**(1/0)", {}, "loss.value: expected exponents from -16 to 16, found inf"),
        ("u**log(-1)", {}, "loss.value: expected exponents from -16 to 16, found nan"),
        ("u**alpha", {"alpha": 20.0}, "loss.value: expected exponents from -16 to 16, found 20"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(text: str, parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        value_function(text, parameters)
