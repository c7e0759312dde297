"""Each pure loss, traced to SymPy, is the equation of its paper: in value and gradient, to 30 digits."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mpmath
import pytest
import sympy
import torch
from torch import Tensor

from halos import objectives
from halos.formulas.value import VALUES, value_function
from halos.objectives import (
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    bco_pair_loss,
    bradley_terry_loss,
    cpo_loss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    f_dpo_loss,
    grpo_loss,
    halo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    nca_loss,
    nca_pair_loss,
    orpo_loss,
    robust_dpo_loss,
    sft_loss,
    simpo_loss,
    slic_loss,
    sppo_loss,
)
from halos.objectives.ppo import clipped_surrogate, kl_penalty
from halos.theory.tracing import Trace, trace

DIGITS, POINTS = 40, 12
RANGES = {
    "beta": (0.05, 3), "label_smoothing": (0.01, 0.4), "clip_range": (0.05, 0.6), "delta": (-2, 2), "gamma": (0, 2),
    "alpha": (0.1, 0.9), "tau": (0.2, 1),
    "desirable_weight": (0.2, 3), "undesirable_weight": (0.2, 3), "chosen": (-4, -0.01), "rejected": (-4, -0.01),
}  # fmt: skip
"""Where parameters and log-probs are drawn from; others from −4 to 4."""


def sigma(x: Any) -> Any:
    """The logistic function, as papers write it."""
    return 1 / (1 + sympy.exp(-x))


def log_odds(x: Any) -> Any:
    return sympy.log(sympy.exp(x) / (1 - sympy.exp(x)))


def larger(a: Any, b: Any) -> Any:
    return sympy.Piecewise((a, a > b), (b, True))


def smaller(a: Any, b: Any) -> Any:
    return sympy.Piecewise((a, a < b), (b, True))


def where(condition: Any, yes: Any, no: Any) -> Any:
    return sympy.Piecewise((yes, condition), (no, True))


FUNCTIONS = {"sigma": sigma, "log_odds": log_odds, "max": larger, "min": smaller, "where": where}
INPUTS = (
    *("policy", "reference", "z0", "policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "u"),
    *("log_ratios", "advantages", "loss_aversion", "targets", "win_probabilities", "margin", "centring", "target"),
)


def typed(equation: str) -> sympy.Expr:
    names = {name: sympy.Symbol(name, real=True) for name in (*INPUTS, *RANGES)}
    return sympy.sympify(equation, locals=names | FUNCTIONS)


@dataclass(frozen=True)
class Equation:
    """An equation as the paper has it.

    Attributes:
        function: the function in question.
        inputs: its inputs with one number each, by name.
        equation: the paper's equation, in the names of the inputs.
        constants: inputs that are no numbers, such as labels.
        frozen: inputs into which no gradient flows.
        digits: to which code and equation agree.
    """

    function: Callable[..., Tensor]
    inputs: str
    equation: str
    constants: Mapping[str, Tensor] | None = None
    frozen: tuple[str, ...] = ()
    digits: int = 30

    def traced(self) -> Trace:
        numbers = {name: torch.tensor([0.3], dtype=torch.float64) for name in self.inputs.split()}
        return trace(self.function, numbers | dict(self.constants or {}))


def label(value: bool) -> dict[str, Tensor]:
    return {"desirable": torch.tensor([value])}


KTO = "policy reference z0 beta desirable_weight undesirable_weight"
PAIR, DPO_PAIR = "chosen rejected", "policy_chosen policy_rejected reference_chosen reference_rejected"
MARGIN = "beta*((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))"
ONE_TOKEN = {"mask": torch.tensor([[True]])}


def grpo_term(number: int, log_ratios: Tensor, **inputs: Any) -> Tensor:
    return grpo_loss(log_ratios[:, None], **inputs)[number]


EQUATIONS = {
    # λ_y − v(x, y), section 4.1 of 2402.01306
    "kto, desirable": Equation(
        kto_loss, KTO, "desirable_weight - desirable_weight*sigma(beta*(policy - reference - z0))", label(True), ("z0",)
    ),
    "kto, undesirable": Equation(
        kto_loss, KTO, "undesirable_weight - undesirable_weight*sigma(beta*(z0 - policy + reference))", label(False),
        ("z0",),
    ),
    # Equation 10 of 2404.04656, for given δ
    "bco, desirable": Equation(
        bco_loss, "policy reference delta beta", "-log(sigma(beta*(policy - reference) - delta))", label(True),
        ("delta",),
    ),
    "bco, undesirable": Equation(
        bco_loss, "policy reference delta beta", "-log(sigma(-(beta*(policy - reference) - delta)))", label(False),
        ("delta",),
    ),
    "bco, pair": Equation(
        bco_pair_loss, f"{PAIR} delta beta", "-log(sigma(beta*chosen - delta)) - log(sigma(-(beta*rejected - delta)))",
        frozen=("delta",),
    ),
    # Equation 7 of 2305.18290, and equation 3 of Mitchell's note
    "dpo": Equation(partial(dpo_loss, label_smoothing=0.0), f"{DPO_PAIR} beta", f"-log(sigma({MARGIN}))"),
    "cdpo": Equation(
        dpo_loss, f"{DPO_PAIR} beta label_smoothing",
        f"-(1 - label_smoothing)*log(sigma({MARGIN})) - label_smoothing*log(sigma(-({MARGIN})))",
    ),
    # Equation 12 of 2403.00409
    "robust_dpo": Equation(
        robust_dpo_loss, f"{PAIR} beta label_smoothing",
        "(-(1 - label_smoothing)*log(sigma(beta*(chosen - rejected)))"
        " + label_smoothing*log(sigma(beta*(rejected - chosen)))) / (1 - 2*label_smoothing)",
    ),
    # Equation 17 of 2310.12036
    "ipo": Equation(ipo_loss, f"{PAIR} beta", "(chosen - rejected - 1/(2*beta))**2"),
    # Equations 7 and 8 of 2408.06266
    "apo_zero": Equation(apo_zero_loss, f"{PAIR} beta", "-sigma(beta*chosen) + sigma(beta*rejected) + 1"),
    "apo_down": Equation(apo_down_loss, f"{PAIR} beta", "sigma(beta*chosen) - sigma(beta*(chosen - rejected)) + 1"),
    # Equation 6 of 2405.14734
    "simpo": Equation(simpo_loss, f"{PAIR} beta gamma", "-log(sigma(beta*chosen - beta*rejected - gamma))"),
    # Equation 7 of 2403.07691
    "orpo": Equation(orpo_loss, PAIR, "-log(sigma(log_odds(chosen) - log_odds(rejected)))"),
    # Equation 3 of 2401.08417
    "cpo": Equation(cpo_loss, f"{PAIR} beta", "-log(sigma(beta*chosen - beta*rejected))"),
    # Section 2.2 of 2305.10425
    "slic": Equation(slic_loss, f"{PAIR} delta", "max(0, delta - chosen + rejected)"),
    # Section 3.4 of 2009.01325
    "bradley_terry": Equation(bradley_terry_loss, PAIR, "-log(sigma(chosen - rejected))"),
    "sft": Equation(sft_loss, "policy", "-policy"),
    # ODPO's offset (2402.10571), IPO's and Bradley-Terry's margins (2307.09288) with centring (2312.09244)
    "dpo, target": Equation(
        partial(dpo_loss, label_smoothing=0.0), f"{DPO_PAIR} beta target", f"-log(sigma({MARGIN} - target))"
    ),
    "ipo, margin": Equation(ipo_loss, f"{PAIR} beta margin", "(chosen - rejected - (1/2 + margin)/beta)**2"),
    "bradley_terry, margin": Equation(
        bradley_terry_loss, f"{PAIR} margin centring",
        "-log(sigma(chosen - rejected - margin)) + centring*(chosen + rejected)**2",
    ),
    # Equation 7 of 2501.03884, for α = 1/4
    "alphapo": Equation(
        partial(simpo_loss, alpha=0.25), f"{PAIR} beta gamma",
        "-log(sigma(beta*(1 - exp(-chosen/4))*4 - beta*(1 - exp(-rejected/4))*4 - gamma))",
    ),
    # "hinge-norm" of 2309.06657
    "hinge": Equation(hinge_loss, f"{PAIR} beta", "max(0, 1 - beta*(chosen - rejected))"),
    # Equation 16 of 2402.00856, for ε = 1/4, whose logarithm the code has in float64
    "exo": Equation(
        partial(exo_loss, label_smoothing=0.25), f"{PAIR} beta",
        "sigma(beta*(chosen - rejected))*log(sigma(beta*(chosen - rejected))/(1 - 1/4))"
        " + sigma(beta*(rejected - chosen))*log(sigma(beta*(rejected - chosen))/(1/4))",
        digits=15,
    ),
    # Of a pair, and of a completion with its share (2402.05369)
    "nca, pair": Equation(
        nca_pair_loss, f"{PAIR} beta",
        "-log(sigma(beta*chosen)) - log(sigma(-beta*chosen))/2 - log(sigma(-beta*rejected))/2",
    ),
    "nca": Equation(
        nca_loss, "log_ratios targets beta", "-targets*log(sigma(beta*log_ratios)) - log(sigma(-beta*log_ratios))"
    ),
    # Equation 4.7 of 2405.00675
    "sppo": Equation(
        sppo_loss, "log_ratios win_probabilities beta", "(log_ratios - (win_probabilities - 1/2)/beta)**2"
    ),
    # The log-ratio modulated loss of 2406.08414
    "discopop": Equation(
        discopop_loss, f"{PAIR} beta tau",
        "-(1 - sigma(beta*(chosen - rejected)/tau))*log(sigma(beta*(chosen - rejected)))"
        " + sigma(beta*(chosen - rejected)/tau)*exp(-beta*(chosen - rejected))",
    ),
    # f' of table 1 of 2309.16240 at u = π_θ/π_ref
    "f_dpo, forward KL": Equation(
        partial(f_dpo_loss, divergence="forward_kl"), f"{PAIR} beta",
        "-log(sigma(beta*(-exp(-chosen)) - beta*(-exp(-rejected))))",
    ),
    "f_dpo, Jensen-Shannon": Equation(
        partial(f_dpo_loss, divergence="jensen_shannon"), f"{PAIR} beta",
        "-log(sigma(beta*log(2*exp(chosen)/(1 + exp(chosen))) - beta*log(2*exp(rejected)/(1 + exp(rejected)))))",
    ),
    "f_dpo, alpha": Equation(
        partial(f_dpo_loss, divergence="alpha"), f"{PAIR} beta alpha",
        "-log(sigma(beta*(1 - exp(-alpha*chosen))/alpha - beta*(1 - exp(-alpha*rejected))/alpha))",
    ),
    # Equation 3 of 2402.03300, for a token and a given advantage
    "grpo, policy": Equation(
        partial(grpo_term, 0), "log_ratios advantages clip_range",
        "-min(exp(log_ratios)*advantages, max(1 - clip_range, min(1 + clip_range, exp(log_ratios)))*advantages)",
        ONE_TOKEN,
    ),
    "grpo, KL penalty": Equation(
        partial(grpo_term, 1, advantages=torch.zeros(1), clip_range=0.5), "log_ratios",
        "exp(log_ratios)*log_ratios - exp(log_ratios) + 1", ONE_TOKEN,
    ),
    # Equation 7 of 1707.06347, for a token and a given advantage; its critic depends on the batch
    "ppo, policy": Equation(
        clipped_surrogate, "log_ratios advantages clip_range",
        "-min(exp(log_ratios)*advantages, max(1 - clip_range, min(1 + clip_range, exp(log_ratios)))*advantages)",
    ),
    "ppo, KL penalty": Equation(kl_penalty, "log_ratios", "exp(log_ratios)*log_ratios - exp(log_ratios) + 1"),
    "halo, gain": Equation(
        partial(halo_loss, value=torch.tanh, constant=2.0), "u desirable_weight undesirable_weight",
        "desirable_weight*(2 - tanh(u))", {"good": torch.tensor([True])},
    ),
    "halo, loss": Equation(
        partial(halo_loss, value=torch.tanh, constant=2.0), "u desirable_weight undesirable_weight",
        "undesirable_weight*(2 - tanh(-u))", {"good": torch.tensor([False])},
    ),
}  # fmt: skip

# The named values of loss=halo, as docs/guides/own-value.md has them; powers are exact from ε on.
NAMED = {
    "logistic": "sigma(beta*u)",
    "log_sigmoid": "log(sigma(beta*u))",
    "kahneman_tversky": "where(u > 0, u**alpha, -loss_aversion*(-u)**alpha)",
    "linear": "beta*u",
    "tanh": "tanh(beta*u)",
    "hinge": "min(beta*u, 1)",
    "exponential": "-exp(-beta*u)",
}


def points(symbols: list[sympy.Symbol], seed: str) -> list[dict[sympy.Symbol, mpmath.mpf]]:
    draw = random.Random(seed)
    return [{s: mpmath.mpf(draw.uniform(*RANGES.get(str(s), (-4, 4)))) for s in symbols} for _ in range(POINTS)]


def assert_same(traced: Any, equation: sympy.Expr, symbols: list[sympy.Symbol], name: str, digits: int = 30) -> None:
    """Both expressions have the same value at random points, in 40 digits."""
    functions = [sympy.lambdify(symbols, expression, "mpmath") for expression in (sympy.sympify(traced), equation)]
    for point in points(symbols, name):
        found, expected = (function(*point.values()) for function in functions)
        assert abs(found - expected) <= mpmath.mpf(10) ** -digits * (1 + abs(expected)), (name, point)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_code_of_a_loss_is_the_papers_equation(name: str) -> None:
    case = EQUATIONS[name]
    found, equation = case.traced(), typed(case.equation)
    symbols = [symbol for array in found.symbols.values() for symbol in array.flat]
    assert {str(symbol) for symbol in equation.free_symbols} <= {str(symbol) for symbol in symbols}
    with mpmath.workdps(DIGITS):
        (value,) = found.value.flat
        assert_same(value, equation, symbols, name, case.digits)
        for symbol in symbols:
            slope = sympy.Integer(0) if str(symbol) in case.frozen else sympy.diff(equation, symbol)
            (gradient,) = found.gradients[str(symbol)].flat
            assert_same(gradient, slope, symbols, f"{name}, by {symbol}", case.digits)


@pytest.mark.parametrize("name", VALUES)
def test_the_code_of_a_named_value_is_its_formula(name: str) -> None:
    value = value_function(name, {})
    found = trace(lambda u: value(u), {"u": torch.tensor([0.5])})
    numbers = {sympy.Symbol(key, real=True): sympy.Rational(repr(n)) for key, n in value.parameters.items()}
    equation, (u,) = typed(NAMED[name]).subs(numbers), found.symbols["u"]
    with mpmath.workdps(DIGITS):
        assert_same(found.value.flat[0], equation, [u], name)
        assert_same(found.gradients["u"].flat[0], sympy.diff(equation, u), [u], f"{name}, by u")


@pytest.mark.parametrize("name", EQUATIONS)
def test_another_equation_is_noticed(name: str) -> None:
    case = EQUATIONS[name]
    found = case.traced()
    symbols = [symbol for array in found.symbols.values() for symbol in array.flat]
    with mpmath.workdps(DIGITS), pytest.raises(AssertionError):
        assert_same(found.value.flat[0], typed(case.equation) + sympy.Rational(1, 10**12), symbols, name, case.digits)


def test_every_pure_loss_has_its_equation() -> None:
    functions = {getattr(case.function, "func", case.function) for case in EQUATIONS.values()}
    covered = {function.__name__ for function in functions} | {"grpo_loss", "ppo_loss"}  # term by term
    batches = {"aot_loss", "infonca_loss", "exo_rw_loss"}  # each loss is one of a sorted batch, or of a group
    assert covered | batches >= {name for name in dir(objectives) if name.endswith("_loss")}
