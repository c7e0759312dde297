"""The grammar of value functions: an expression in u, which is checked and interpreted, never run as Python.

Python's parser makes the tree, because the notation is Python's. :func:`parse` accepts only the nodes that
:func:`halos.formulas.interpreter.interpret` knows, so that a formula from a stranger's configuration can compute
numbers and nothing else.
"""

from __future__ import annotations

import ast
import math
import warnings

PARAMETERS = ("beta", "alpha", "loss_aversion")
ARITY = {
    **dict.fromkeys(("exp", "log", "log1p", "expm1", "sigmoid", "log_sigmoid", "logsigmoid", "tanh", "softplus"), 1),
    **dict.fromkeys(("relu", "abs", "sqrt", "sign"), 1),
    **dict.fromkeys(("min", "max"), 2),
    **dict.fromkeys(("clip", "where"), 3),
}
"""The functions of the grammar, and the number of their arguments."""
LONGEST, DEEPEST, LARGEST_POWER = 400, 32, 16.0
"""Limits: characters of a formula, levels of its tree, and the size of an exponent."""
_PLAIN = ", ".join(name for name in ARITY if name != "where")
ALLOWED = f"allowed are u, {', '.join(PARAMETERS)}, numbers, + - * / **, {_PLAIN} and where(a < b, x, y)"
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)


def parse(text: str) -> ast.expr:
    """Parse a formula.

    Raises:
        ValueError: the text is not a formula in u, or exceeds a limit; the error names the place.
    """
    if not isinstance(text, str) or not 0 < len(text.strip()) <= LONGEST:
        found = f"{len(text)} characters" if isinstance(text, str) else repr(text)
        raise ValueError(f"loss.value: expected a formula in u of up to {LONGEST} characters, found {found}; {ALLOWED}")
    text = text.strip()
    odd = next((n for n, letter in enumerate(text) if not (letter.isascii() and letter.isprintable())), None)
    if odd is not None:
        raise _refusal(text, odd, f"{text[odd]!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of some texts that are refused below
            tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise _refusal(text, max((error.offset or 1) - 1, 0), error.msg) from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise _refusal(text, 0, str(error) or "too many levels") from None
    _check(tree, text)
    if not reads(tree, "u"):
        raise _refusal(text, 0, "no u")
    return tree


def reads(tree: ast.expr, name: str) -> bool:
    """Whether a formula reads ``u`` or a parameter."""
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))


def _check(node: ast.expr, text: str, depth: int = 1) -> None:
    if depth > DEEPEST:
        raise _refusal(text, node.col_offset, f"more than {DEEPEST} levels")
    for child in _children(node, text):
        _check(child, text, depth + 1)


def _children(node: ast.expr, text: str) -> list[ast.expr]:
    # The parts of a node that the grammar has; every other node is refused.
    match node:
        case ast.Constant(value=float() | int() as number) if not isinstance(number, bool):
            if not abs(number) < 1e30:  # also true of an integer that is too large for a float
                raise _refusal(text, node.col_offset, "a number from 1e30 on")
            return []
        case ast.Name(id=name) if name == "u" or name in PARAMETERS:
            return []
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            return [node.operand]
        case ast.BinOp() if isinstance(node.op, _OPERATORS):
            if isinstance(node.op, ast.Pow) and reads(node.right, "u"):
                raise _refusal(text, node.right.col_offset, "an exponent with u; write exp(u * log(a)) for a**u")
            return [node.left, node.right]
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in ARITY:
            return _arguments(node, name, text)
    raise _refusal(text, node.col_offset, f"{(ast.get_source_segment(text, node) or text)[:40]!r}")


def _arguments(node: ast.Call, name: str, text: str) -> list[ast.expr]:
    if len(node.args) != ARITY[name]:
        raise _refusal(text, node.col_offset, f"{name} with {len(node.args)} arguments instead of {ARITY[name]}")
    if name != "where":
        return node.args
    condition, *branches = node.args
    match condition:
        case ast.Compare(left=left, ops=[operator], comparators=[right]) if isinstance(operator, _COMPARISONS):
            return [left, right, *branches]
    raise _refusal(text, condition.col_offset, "where without one comparison by <, <=, > or >= as its first argument")


def _refusal(text: str, place: int, found: str) -> ValueError:
    where = f"found {found} at character {place + 1} of {text!r}"
    return ValueError(f"loss.value: expected a formula in u, {where}; {ALLOWED}")


def exponent(value: float) -> float:
    """An exponent, checked to be a number of a size that powers stay finite with.

    Raises:
        ValueError: for another number.
    """
    if not (math.isfinite(value) and abs(value) <= LARGEST_POWER):
        raise ValueError(
            f"loss.value: expected exponents from -{LARGEST_POWER:g} to {LARGEST_POWER:g}, found {value:g}"
        )
    return value
