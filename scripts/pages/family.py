"""The page of the family: each loss by what it needs and by the shape of its value function, computed from its code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

from halos.objectives.base import Objective
from halos.objectives.bco import RewardShift
from halos.theory.definition import ignores_others, is_halo, moves_with_others
from halos.theory.plot import plot_values
from halos.theory.shapes import gradient_bounds, shape
from halos.theory.values import ImpliedLoss, Side, sides
from scripts.pages.losses import notes, objective, settings
from scripts.pages.text import page, table

DATA = {"binary": "labels", "pairs": "pairs", "scored": "scores", "demonstrations": "demonstrations"}
TERMS = {"ppo": ("policy",)}
"""Losses with a second row, of these terms alone: PPO-Clip is the clipped surrogate, without critic and penalty."""
Terms = tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Entry:
    """What the page has about one loss.

    Attributes:
        needs: data, whether a reference model, the reference point, whether it is a HALO.
        shape: how the value bends in gains and in losses, loss aversion, the bound of the gradient.
        failures: why it is not a HALO; empty for a HALO.
    """

    needs: tuple[str, ...]
    shape: tuple[str, ...]
    failures: tuple[str, ...]


def family() -> dict[str, partial[Objective]]:
    """Return the constructor of each loss with the parameters of its YAML, without mixtures, which are sums of them."""
    return {name: _maker(name) for name in notes() if "parts" not in settings(name)}


def _maker(name: str, **changed: float) -> partial[Objective]:
    values: dict[str, Any] = {key: value for key, value in settings(name).items() if key not in ("_target_", "name")}
    return partial(objective(name), **values | changed)


@cache
def entry(name: str, terms: Terms = None) -> Entry:
    """Compute what the page has about a loss, or about some of its terms."""
    make = _maker(name)
    verdict = is_halo(make, terms=terms)
    needs = make(None).needs
    halo = f"yes, r = {verdict.reward}" if verdict else "no"
    shapes = {side: shape(make, side, terms=terms) for side in sides(make(None))}
    bend = [_words({side: getattr(found, key) for side, found in shapes.items()}) for key in ("gains", "losses")]
    aversion = _words({side: found.aversion for side, found in shapes.items()})
    drawn: tuple[str, ...] = (*bend, aversion, _words({side: _bounds(name, side, terms) for side in shapes}))
    if needs.moves == (0, 0):  # a reward model's
        drawn = ("–", "–", "–", "–")
    needed = (DATA[make(None).view], "yes" if needs.reference else "no", _reference_point(make), halo)
    return Entry(needed, drawn, verdict.failures)


def _words(by_side: Mapping[Side, str]) -> str:
    # One text where both sides are alike.
    if len(set(by_side.values())) == 1:
        return next(iter(by_side.values()))
    return "; ".join(f"{text} ({side.name.lower()})" for side, text in by_side.items())


def _reference_point(make: partial[Objective]) -> str:
    described, loss = make(None), ImpliedLoss(make, Side.DESIRABLE)
    if isinstance(getattr(described, "shift", None), RewardShift):
        return "the middle of the mean rewards of both kinds"
    if moves_with_others(loss):
        mismatched = "the mean of mismatched replies" + (", at least 0" if described.needs.reference else "")
        return {"pairs": "the rejected reply", "binary": mismatched, "scored": "the group"}[described.view]
    return "0" if described.needs.reference and ignores_others(loss) else "none"


def _bounds(name: str, side: Side, terms: Terms) -> str:
    # Where a bound doubles with β it is printed as a multiple of β, which holds for every β.
    beta = settings(name).get("beta")
    bounds = gradient_bounds(_maker(name), side, terms=terms)
    doubled = gradient_bounds(_maker(name, beta=2 * beta), side, terms=terms) if beta else bounds
    texts = [_bound(bound, other, beta) for bound, other in zip(bounds, doubled, strict=True)]
    if _maker(name)(None).view != "pairs" or texts[0] == texts[1]:
        return texts[0]
    return f"{texts[0]} (chosen), {texts[1]} (rejected)"


def _bound(bound: float, doubled: float, beta: float | None) -> str:
    if math.isinf(bound):
        return "none"
    if beta and bound and abs(doubled / bound - 2) < 1e-3:
        return _multiple(bound / beta)
    return f"{bound:.3g}"


def _multiple(factor: float) -> str:
    fraction = Fraction(factor).limit_denominator(8)
    if abs(float(fraction) - factor) > 1e-3 * factor:
        return f"{factor:.3g}β"
    top = "β" if fraction.numerator == 1 else f"{fraction.numerator}β"
    return top if fraction.denominator == 1 else f"{top}/{fraction.denominator}"


def draw_family(file: Path) -> None:
    """Draw the value functions of all losses but reward models, as small panels."""
    makes = {name: make for name, make in family().items() if make(None).needs.moves != (0, 0)}
    plot_values(makes, file, reach=20.0, points=81, columns=8, panel=(1.7, 1.5))


def family_page() -> str:
    """Return the tables of all losses."""
    rows: list[tuple[str, Entry]] = []
    for name in family():
        link = f"[`{name}`](../losses/{name}.md)"
        rows.append((link, entry(name)))
        if name in TERMS:
            rows.append((f"{link}, {' and '.join(TERMS[name])} term alone", entry(name, TERMS[name])))
    return page(
        "# The family of losses",
        "<!-- written by `python scripts/write_docs.py` -->",
        "This page compares all losses by what they need and by the shape of their value functions. Everything in the "
        "tables is computed by [halos.theory](../reference/api/theory.md) from the code of the losses, with the "
        "parameters of `conf/loss`. Mixtures are left out: they are sums of these losses. "
        "[Value functions](values.md) explains the terms.",
        "![The value functions of all losses](family.png)",
        "Each panel shows the value of a reply over its log-ratio minus the reference point, in nats. The log-ratio of "
        "what the reply is compared with is 1 nat. The value is the loss at the reference point minus the loss. The "
        "vertical axes differ, because values have different units.",
        "## What they need",
        table(
            ("`loss=`", "data", "reference model", "reference point", "HALO"),
            [(link, *found.needs) for link, found in rows],
        ),
        [
            "- **Reference point**: what a reply's log-ratio is compared with. *0* means a constant, the log-ratio at "
            "which policy and reference agree. *None* means that the loss is not a function of a difference, or "
            "compares nothing.",
            "- **HALO**: whether the loss is human-aware by Definition 3.4 of the [KTO paper](https://arxiv.org/abs/"
            "2402.01306), checked by `is_halo` on a grid of log-ratios from −60 to 60 nats, and with which implied "
            "reward r. For pairs, the loss of the chosen reply is checked. The middle of the mean rewards is held at "
            "0, WPO's weights at 1.",
            "- AOT sorts the pairs of a batch. These tables are for a batch of one pair, where AOT equals DPO.",
        ],
        "## Shape, loss aversion, steepness",
        table(
            ("`loss=`", "value in gains", "value in losses", "loss-averse", "bound of the gradient"),
            [(link, *found.shape) for link, found in rows],
        ),
        [
            "- **Gains and losses** are seen by the person who gave the feedback: a gain is a desirable reply above "
            "the reference point, or an undesirable one below it. The shape is read off exact derivatives at gains and "
            "losses from 0.01 to 60 nats, from the reference point outwards. For what a reply is compared with, policy "
            "and reference agree; so APO-down's chosen reply, whose two terms then cancel, is flat.",
            "- **Loss-averse**: whether losses weigh more than gains of the same size u, measured by the slopes "
            "v′(−u) and v′(u) for one reply: *averse* if never less, *seeking* if never more, *neutral* if equally "
            "much, *mixed* if it depends on u. The weights λ_D and λ_U of the two kinds come on top of this.",
            "- **Bound of the gradient**: the largest |∂loss/∂r| of a reply, where r is its log-ratio, or its log-prob "
            "for a loss without a reference. The reference point, advantages and weights from the policy are held "
            "fixed. Replies have one token here, so sums and means over tokens are equal. For scored replies, the loss "
            "is the mean over two replies. A multiple of β holds for every β. *None* means that the gradient is "
            "unbounded, so an outlier can dominate a step. `halo` has a bound only because powers are smoothed near 0.",
        ],
        "## Why the others are not HALOs",
        table(
            ("`loss=`", "what fails"),
            [(link, "; ".join(found.failures)) for link, found in rows if found.failures],
        ),
    )
