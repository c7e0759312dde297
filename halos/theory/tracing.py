"""Formulas of pure loss functions as SymPy expressions, traced from a call of the function itself.

PyTorch records which operations the call and its backward pass consist of. They are then repeated on arrays of symbols,
so that both the formula and the gradient come from the code, not from a second copy of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

Array = np.ndarray
"""An array of SymPy expressions, or of booleans."""
Symbolic = Any
"""A number, an expression of SymPy, which has no types, or an array of them."""
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Trace:
    """What a function computes.

    Attributes:
        symbols: the symbols of each input, in its shape: ``name``, or ``name_0_1`` where it has several numbers.
        value: the function's values.
        gradients: the derivative of the sum of the values by each input.
    """

    symbols: Mapping[str, Array]
    value: Array
    gradients: Mapping[str, Array]


def trace(function: Function, inputs: Mapping[str, Tensor]) -> Trace:
    """Trace a function and its gradient.

    Args:
        function: a pure function of tensors that returns one tensor.
        inputs: its arguments by name. Those of floating point become symbols, and their numbers do not matter; others,
            such as labels and masks, stay what they are.

    Raises:
        NotImplementedError: for an operation that no line below translates.
    """
    names = [name for name, value in inputs.items() if value.is_floating_point()]
    constants = {name: value for name, value in inputs.items() if name not in names}

    def with_gradient(*values: Tensor) -> tuple[Tensor, ...]:
        leaves = [value.detach().requires_grad_() for value in values]
        result = function(**dict(zip(names, leaves, strict=True)), **constants)
        slopes = torch.autograd.grad(result.sum(), leaves, allow_unused=True, materialize_grads=True)
        return result, *slopes

    # Copies, as PyTorch would take one tensor under two names for one input.
    examples = [inputs[name].double().clone() for name in names]
    graph = make_fx(with_gradient, decomposition_table=_decompositions())(*examples)
    symbols = {name: _symbols(name, inputs[name].shape) for name in names}
    value, *gradients = _Symbolic(graph).run(*symbols.values())
    return Trace(symbols, np.asarray(value), dict(zip(names, map(np.asarray, gradients), strict=True)))


@cache
def _decompositions() -> dict[Any, Callable[..., Symbolic]]:
    aten = torch.ops.aten
    packets = (aten.log_sigmoid_forward, aten.log_sigmoid_backward, aten.sigmoid_backward, aten.threshold_backward)
    others = (aten.tanh_backward, aten.softplus, aten.softplus_backward, aten.logit_backward, aten.logsumexp)
    return cast("dict[Any, Callable[..., Symbolic]]", get_decompositions([*packets, *others]))


def _symbols(name: str, shape: torch.Size) -> Array:
    array = np.empty(tuple(shape), dtype=object)
    for index in np.ndindex(array.shape):
        suffix = "".join(f"_{i}" for i in index) if array.size > 1 else ""
        array[index] = sympy.Symbol(name + suffix, real=True)
    return array


class _Symbolic(Interpreter):
    # Repeats recorded operations on arrays of expressions.
    def call_function(self, target: Any, args: tuple[Symbolic, ...], kwargs: dict[str, object]) -> Symbolic:
        name = target.overloadpacket.__name__.removesuffix("_")
        if name in ELEMENTWISE:
            return ELEMENTWISE[name](*args)
        if name in STRUCTURAL:
            return STRUCTURAL[name](*args)
        raise NotImplementedError(f"{target}: expected an operation of halos/theory/tracing.py, found another one")

    def get_attr(self, target: Any, args: tuple[Symbolic, ...], kwargs: dict[str, object]) -> Array:
        # Labels and masks, which are not inputs of the traced function.
        return np.asarray(super().get_attr(target, args, kwargs))


def _choose(condition: Symbolic, yes: Symbolic, no: Symbolic) -> Symbolic:
    if condition in (True, False):  # a label or a mask, or a comparison of numbers
        return yes if condition else no
    # Unevaluated: SymPy would rewrite nested conditions, which takes longer than all the rest.
    return sympy.Piecewise((yes, condition), (no, True), evaluate=False)


def _clamp(x: Symbolic, low: Symbolic = None, high: Symbolic = None) -> Symbolic:
    x = x if low is None else _choose(x < low, low, x)
    return x if high is None else _choose(x > high, high, x)


def _exact(number: Symbolic) -> Symbolic:
    # A float is the number that it stands for, as in the formula: 0.1 is 1/10, not the nearest double.
    if isinstance(number, float):
        return sympy.Rational(repr(number)) if math.isfinite(number) else sympy.sympify(number)
    return number


def _number(value: Symbolic) -> Symbolic:
    # Conditions count as 1 and 0 in arithmetic. SymPy's symbols of numbers are of the class of conditions too.
    if isinstance(value, bool | np.bool_ | Boolean) and not isinstance(value, sympy.Symbol):
        return _choose(value, sympy.Integer(1), sympy.Integer(0))
    return _exact(value)


def _elementwise(function: Callable[..., Symbolic], convert: Callable[[Symbolic], Symbolic]) -> Callable[..., Array]:
    def apply(*args: Symbolic) -> Array:
        return np.asarray(np.frompyfunc(lambda *values: function(*map(convert, values)), len(args), 1)(*args))

    return apply


_ARITHMETIC: dict[str, Callable[..., Symbolic]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "neg": lambda a: -a,
    "reciprocal": lambda a: 1 / a,
    "exp": sympy.exp,
    "expm1": lambda a: sympy.exp(a) - 1,
    "log": sympy.log,
    "log1p": lambda a: sympy.log(1 + a),
    "sigmoid": lambda a: 1 / (1 + sympy.exp(-a)),
    "tanh": sympy.tanh,
    "sqrt": sympy.sqrt,
    "abs": sympy.Abs,
    "sgn": sympy.sign,
    "sign": sympy.sign,
    "relu": lambda a: _choose(a > 0, a, sympy.Integer(0)),
    "minimum": lambda a, b: _choose(a < b, a, b),
    "maximum": lambda a, b: _choose(a > b, a, b),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": sympy.Eq,
    "ne": sympy.Ne,
}
_LOGICAL: dict[str, Callable[..., Symbolic]] = {
    "where": _choose,
    "masked_fill": lambda a, mask, value: _choose(mask, value, a),
    "logical_and": sympy.And,
    "logical_or": sympy.Or,
    "logical_not": sympy.Not,
    "bitwise_and": sympy.And,
    "bitwise_not": sympy.Not,
}
ELEMENTWISE = {name: _elementwise(function, _number) for name, function in _ARITHMETIC.items()} | {
    name: _elementwise(function, _exact) for name, function in _LOGICAL.items()
}
_LARGEST = np.frompyfunc(_ARITHMETIC["maximum"], 2, 1)
STRUCTURAL: dict[str, Callable[..., Symbolic]] = {
    **dict.fromkeys(("detach", "alias", "clone", "lift_fresh_copy", "_to_copy", "lift_fresh"), lambda a, *_: a),
    "expand": lambda a, shape, *_: np.broadcast_to(a, shape),
    "view": lambda a, shape: a.reshape(shape),
    "_unsafe_view": lambda a, shape: a.reshape(shape),
    "unsqueeze": lambda a, dim: np.expand_dims(a, dim),
    "squeeze": lambda a, dims=None: np.squeeze(a, tuple(dims) if isinstance(dims, list) else dims),
    "sum": lambda a, dims=None, keep=False, **_: np.asarray(
        np.sum(a, axis=None if dims is None else tuple(dims), keepdims=keep)
    ),
    "amax": lambda a, dims, keep=False: _LARGEST.reduce(a, axis=tuple(dims), keepdims=keep),
    "ones_like": lambda a, *_: np.full(a.shape, sympy.Integer(1)),
    "zeros_like": lambda a, *_: np.full(a.shape, sympy.Integer(0)),
    "new_zeros": lambda a, shape, *_: np.full(tuple(shape), sympy.Integer(0)),
    "new_full": lambda a, shape, value, *_: np.full(tuple(shape), _exact(value), dtype=object),
    "scalar_tensor": lambda value, *_: np.asarray(_exact(value), dtype=object),
}
