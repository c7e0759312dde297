"""Value functions of human-aware losses: a name or a formula in u, the gain over the reference point in nats."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from halos.formulas.grammar import ALLOWED, PARAMETERS, exponent, parse, reads
from halos.formulas.interpreter import SMOOTHED, interpret

VALUES: dict[str, tuple[str, float]] = {
    "logistic": ("sigmoid(beta*u)", 1.0),
    "log_sigmoid": ("log_sigmoid(beta*u)", 0.0),
    "kahneman_tversky": ("where(u > 0, u**alpha, -loss_aversion*(-u)**alpha)", 0.0),
    "linear": ("beta*u", 0.0),
    "tanh": ("tanh(beta*u)", 1.0),
    "hinge": ("min(beta*u, 1)", 1.0),
    "exponential": ("-exp(-beta*u)", 0.0),
}
"""Named value functions: the formula v(u), and C, what v tends to for large gains or 0 where it has no limit."""
DEFAULTS = {"beta": 0.1, "alpha": 0.88, "loss_aversion": 2.25}
"""β, and α and λ as Tversky and Kahneman (1992) estimated them."""
CHECKED = (-50.0, -5.0, -1.0, -SMOOTHED, 0.0, SMOOTHED, 1.0, 5.0, 50.0)
"""Gains in nats at which a value and its slope have to be finite, in float32."""
_SYMBOLS = {
    "beta": "β", "alpha": "α", "loss_aversion": "λ", "log_sigmoid": "log σ", "logsigmoid": "log σ", "sigmoid": "σ",
}  # fmt: skip


@dataclass(frozen=True)
class ValueFunction:
    """v(u), and the constant C of the loss C − v(u).

    Attributes:
        text: the formula.
        constant: C.
        parameters: the values of the parameters that the formula reads.
        tree: the formula with numbers in place of its parameters.
        smoothed: whether the formula has a power between 0 and 1, or a square root.
    """

    text: str
    constant: float
    parameters: Mapping[str, float]
    tree: ast.expr
    smoothed: bool

    def __call__(self, u: Tensor) -> Tensor:
        """v of gains, in nats, any shape."""
        return interpret(self.tree, u)

    def slope(self, u: Tensor) -> Tensor:
        """dv/du at gains, in nats."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self(u).sum(), [u], materialize_grads=True)
        return slope

    @property
    def symbols(self) -> str:
        """The formula with the paper's symbols."""
        names = "|".join(_SYMBOLS)
        text = re.sub(rf"\b({names})\b", lambda match: _SYMBOLS[match[0]], self.text)
        return text.replace("**", "^").replace("*", "·").replace("-", "−")


def value_function(value: str, parameters: Mapping[str, float | None]) -> ValueFunction:
    """Make a value function.

    Args:
        value: a name of :data:`VALUES`, or a formula; C is 0 for a formula.
        parameters: values of β, α and λ (``loss_aversion``); None: the default, if the formula reads the parameter.

    Raises:
        ValueError: the formula is none, a parameter is set that it does not read, or its value or slope is not finite
            at one of :data:`CHECKED`.
    """
    text, constant = VALUES.get(value, (value, 0.0)) if isinstance(value, str) else (value, 0.0)
    if isinstance(value, str) and value.isidentifier() and value not in ("u", *VALUES):
        names = f"expected one of {', '.join(VALUES)}, or a formula in u"
        raise ValueError(f"loss.value: {names}, found {value!r}; {ALLOWED}")
    tree = parse(text)
    used = {}
    for name in PARAMETERS:
        number = parameters.get(name)
        if reads(tree, name):
            used[name] = DEFAULTS[name] if number is None else number
        elif number is not None:
            raise ValueError(f"loss.{name}: expected null, as loss.value={text!r} does not read it, found {number!r}")
    bind = _Bind(used)
    function = ValueFunction(text.strip(), constant, used, bind.visit(deepcopy(tree)), bind.smoothed)
    _check_finite(function)
    return function


class _Bind(ast.NodeTransformer):
    # Puts numbers in place of parameters and exponents.
    def __init__(self, parameters: Mapping[str, float]) -> None:
        self.parameters, self.smoothed = parameters, False

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float(self.parameters[node.id])) if node.id in self.parameters else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.op, ast.Pow):
            p = exponent(float(interpret(node.right, torch.zeros((), dtype=torch.float64))))
            node.right = ast.Constant(p)
            self.smoothed |= 0 < p < 1
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        assert isinstance(node.func, ast.Name)
        self.smoothed |= node.func.id == "sqrt"
        node.args = [self.visit(argument) for argument in node.args]  # not the function's name
        return node


def _check_finite(value: ValueFunction) -> None:
    for u in CHECKED:
        point = torch.tensor(u)
        numbers = {"value": value(point), "slope": value.slope(point)}
        for what, number in numbers.items():
            if not number.isfinite():
                expected = f"expected a finite {what} at u = {u:g}, found {number.item()} of {value.text!r}"
                hint = "write where(u > 0, …, …) around what has no value for some u"
                raise ValueError(f"loss.value: {expected}; {hint}")
