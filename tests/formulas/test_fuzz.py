"""Made-up and mutated formulas: each is computed or refused in one line, at once, and nothing in it runs."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import torch

from halos.formulas.grammar import ARITY
from halos.formulas.value import VALUES, value_function

ODD = (
    "__import__('os')", ".__class__", "[0]", "eval", "open('{marker}', 'w')", "lambda u: u", "u:=u", "9**9", "1e308",
    "**", "//", "u if u else u", "f'{u}'", "\\", "\n", "\0", "β", "#", ";", "yield", "await u", "...", "{}", "()", ",",
    "(" * 30, ")" * 30, "-" * 30, "u**16*", "\ud800",
)  # fmt: skip
PARTS = ("u", "beta", "alpha", "loss_aversion", "+", "-", "*", "/", "(", ")", ",", "2", "0.5", ">", "<=", *ARITY)
WORST = 2.0
"""Seconds; a formula takes about a millisecond."""


def made_up(draw: random.Random, marker: Path) -> str:
    text = draw.choice([formula for formula, _ in VALUES.values()])
    tokens = re.findall(r"[\w.]+|\*\*|<=|\S", text)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(tokens))
        new = draw.choice(ODD if draw.random() < 0.3 else PARTS).replace("{marker}", str(marker))
        tokens[at : at + draw.randint(0, 1)] = [new]
    return " ".join(tokens)


def outcome(text: str) -> str:
    """``accepted``, or the error."""
    try:
        value = value_function(text, {})
    except ValueError as error:
        return str(error)
    u = torch.linspace(-50, 50, 11)
    assert value(u).shape == u.shape
    return "accepted"


def test_formulas_of_strangers(tmp_path: Path) -> None:
    draw, marker, outcomes = random.Random(0), tmp_path / "marker", list[str]()
    for _ in range(1500):
        text = made_up(draw, marker)
        start = time.monotonic()
        outcomes.append(outcome(text))
        assert time.monotonic() - start < WORST, text
    assert not marker.exists()
    assert outcomes.count("accepted") > 30
    errors = {error for error in outcomes if error != "accepted"}
    assert all(error.startswith(("loss.value: expected", "loss.beta: ")) and "\n" not in error for error in errors)
    assert len(errors) > 500
