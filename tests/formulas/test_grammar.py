"""What the grammar accepts, and that everything else is refused with its place and without being run."""

from __future__ import annotations

import ast
import re
import time

import pytest

from halos.formulas.grammar import ARITY, LONGEST, exponent, parse, reads
from halos.formulas.interpreter import FUNCTIONS


def calls(tree: ast.AST) -> int:
    return sum(isinstance(node, ast.Call) for node in ast.walk(tree))


@pytest.mark.parametrize(
    "text",
    [
        "u", "-u", "+u", "2*u", "u/3", "u - 1.5e-3", "u**2", "u**(1/2)", "u**beta", "(u)", " u ", "tanh(beta*u)",
        "where(u>0, u**0.88, -2.25*(-u)**0.88)", "where(u <= 1, where(u < 0, u, 0), 1)", "clip(u, -1, 1)",
        "min(max(u, -1), loss_aversion)",
    ],
)  # fmt: skip
def test_formulas_are_accepted(text: str) -> None:
    assert reads(parse(text), "u")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("__import__('os').system('touch x')", "\"__import__('os').system('touch x')\" at character 1"),
        ("1 + u.__class__", "'u.__class__' at character 5"),
        ("u[0]", "'u[0]' at character 1"),
        ("eval(u)", "'eval(u)' at character 1"),
        ("exp(exp)", "'exp' at character 5"),
        ("(exp)(u)(u)", "'(exp)(u)(u)' at character 1"),
        ("exp(*u)", "'*u' at character 5"),
        ("exp(x=u)", "'exp(x=u)' at character 1"),
        ("lambda: u", "'lambda: u' at character 1"),
        ("[u for u in u]", "'[u for u in u]' at character 1"),
        ("(u := 1)", "'u := 1' at character 2"),
        ("u if u > 0 else 0", "'u if u > 0 else 0' at character 1"),
        ("u and u", "'u and u' at character 1"),
        ("u > 0", "'u > 0' at character 1"),
        ("not u", "'not u' at character 1"),
        ("~u", "'~u' at character 1"),
        ("u @ u", "'u @ u' at character 1"),
        ("u // 2", "'u // 2' at character 1"),
        ("u % 2", "'u % 2' at character 1"),
        ("u << 9", "'u << 9' at character 1"),
        ("f'{u}'", "\"f'{u}'\" at character 1"),
        ("u + 'a'", "\"'a'\" at character 5"),
        ("u * True", "'True' at character 5"),
        ("u * 1j", "'1j' at character 5"),
        ("u * ...", "'...' at character 5"),
        ("u * 1e999", "a number from 1e30 on at character 5"),
        ("u * 1" + "0" * 320, "a number from 1e30 on at character 5"),
        ("gamma * u", "'gamma' at character 1"),
        ("β * u", "'β' at character 1"),
        ("u\n+ 1", "'\\n' at character 2"),
        ("u\0", "'\\x00' at character 2"),
        ("u +", "invalid syntax at character"),
        ("(u", "'(' was never closed at character 1"),
        ("2", "no u at character 1"),
        ("2**u", "an exponent with u; write exp(u * log(a)) for a**u at character 4"),
        ("min(u)", "min with 1 arguments instead of 2 at character 1"),
        ("where(u, 1, 2)", "where without one comparison by <, <=, > or >= as its first argument at character 7"),
        ("where(0 < u < 1, 1, u)", "where without one comparison by <, <=, > or >= as its first argument at character"),
        ("where(u == 0, 1, u)", "where without one comparison by <, <=, > or >= as its first argument at character 7"),
        ("-" * 40 + "u", "more than 32 levels at character 33"),
        ("+".join("u" * 40), "more than 32 levels at character 1"),
        ("(" * 250 + "u", "too many nested parentheses at character"),
    ],
)
def test_everything_else_is_refused_at_its_place(text: str, found: str) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"^loss.value: expected a formula in u, found {re.escape(found)}") as caught:
        parse(text)
    assert time.monotonic() - start < 1
    assert "; allowed are u, beta, alpha, loss_aversion, numbers, + - * / **, exp, " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"), [("", "0 characters"), ("u+" * 200 + "u", "401 characters"), (3, "3"), (None, "None")]
)
def test_texts_of_another_length_or_kind_are_refused(text: str, found: str) -> None:
    start = f"loss.value: expected a formula in u of up to {LONGEST} characters, found {found}; allowed are"
    with pytest.raises(ValueError, match=f"^{re.escape(start)}"):
        parse(text)


def test_every_function_of_the_grammar_is_interpreted() -> None:
    assert set(ARITY) == {*FUNCTIONS, "where"}


@pytest.mark.parametrize("value", [16.5, -17.0, float("inf"), float("nan")])
def test_exponents_are_limited(value: float) -> None:
    with pytest.raises(ValueError, match=r"^loss\.value: expected exponents from -16 to 16, found"):
        exponent(value)
    assert exponent(-16.0) == -16.0
