"""Computes a formula's tree on tensors, with a finite slope wherever the formula has one.

Two things are treated with care. ``where`` computes both of its branches for all elements, so a function in a branch
reads 1 in place of its argument for the elements that take the other branch: a NaN there would reach the gradient,
although the value is not used. And x**p with 0 < p < 1 has an infinite slope at 0, where every run starts: within
:data:`SMOOTHED` of 0 it is replaced by a parabola, see :func:`power`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

SMOOTHED = 1e-3
"""ε: powers between 0 and 1 are exact from this base on."""


def power(x: Tensor, p: float) -> Tensor:
    """x**p, smoothed if 0 < p < 1: for 0 ≤ x ≤ ε it is ε**p ((2 − p) x/ε − (1 − p) (x/ε)²).

    This is the parabola through (0, 0) that has the value and the slope of x**p at ε. It is increasing and concave, as
    x**p is, and its slope at 0 is (2 − p) ε**(p − 1). For x < 0 a smoothed power is NaN.
    """
    if not 0 < p < 1:
        return x**p
    t = x / SMOOTHED
    parabola = SMOOTHED**p * ((2 - p) * t - (1 - p) * t * t)
    # The power reads ε where the parabola is taken: its own slope there may be infinite, and infinity times 0 is NaN.
    smooth = torch.where(x > SMOOTHED, x.clamp(min=SMOOTHED) ** p, parabola)
    return torch.where(x < 0, torch.nan, smooth)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "log1p": torch.log1p,
    "expm1": torch.expm1,
    "sigmoid": torch.sigmoid,
    "log_sigmoid": logsigmoid,
    "logsigmoid": logsigmoid,
    "tanh": torch.tanh,
    "softplus": softplus,
    "relu": torch.relu,
    "abs": torch.abs,
    "sqrt": lambda x: power(x, 0.5),
    "sign": torch.sign,
    "min": torch.minimum,
    "max": torch.maximum,
    "clip": lambda x, low, high: torch.minimum(torch.maximum(x, low), high),
}
OPERATORS: dict[type[ast.AST], Callable[[Tensor, Tensor], Tensor]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def interpret(tree: ast.expr, u: Tensor, taken: Tensor | None = None) -> Tensor:
    """Compute a formula.

    Args:
        tree: a formula whose parameters and exponents are numbers.
        u: the gains.
        taken: the elements of u that take the branch which this part of the formula is in, bool; None: all.

    Returns:
        A tensor of the shape of u, or a scalar for a part without u.
    """

    def safe(part: ast.expr) -> Tensor:
        value = interpret(part, u, taken)
        return value if taken is None else torch.where(taken, value, 1.0)

    match tree:
        case ast.Constant(value=float() | int() as value):
            return u.new_full((), value)
        case ast.UnaryOp(op=sign, operand=part):
            return -interpret(part, u, taken) if isinstance(sign, ast.USub) else interpret(part, u, taken)
        case ast.BinOp(op=ast.Pow(), left=base, right=ast.Constant(value=float() as p)):
            return power(safe(base), p)
        case ast.BinOp(op=ast.Div(), left=left, right=right):
            return interpret(left, u, taken) / safe(right)
        case ast.BinOp(op=op, left=left, right=right):
            return OPERATORS[type(op)](interpret(left, u, taken), interpret(right, u, taken))
        case ast.Call(func=ast.Name(id="where"), args=[condition, yes, no]):
            return _where(condition, yes, no, u, taken)
        case ast.Call(func=ast.Name(id=name), args=args):
            return FUNCTIONS[name](*map(safe, args))
    return u  # the only name that is left


def _where(condition: ast.expr, yes: ast.expr, no: ast.expr, u: Tensor, taken: Tensor | None) -> Tensor:
    assert isinstance(condition, ast.Compare)  # the grammar accepts no other condition
    left, right = (interpret(part, u, taken) for part in (condition.left, condition.comparators[0]))
    holds = OPERATORS[type(condition.ops[0])](left, right)
    first, second = (holds, ~holds) if taken is None else (taken & holds, taken & ~holds)
    return torch.where(holds, interpret(yes, u, first), interpret(no, u, second))
