"""Shapes and bounds of value functions, against what follows from the formulas by hand."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest

from halos.objectives import DPO, EXO, HALO, IPO, KTO, ORPO, PPO, SFT, APODown, Hinge, NCAPair, SimPO
from halos.theory import Shape, Side, gradient_bounds, shape

BETA = 0.3


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # σ is an odd function around 0 but for a constant: concave above, convex below, as steep at −u as at u.
        (KTO, Shape("concave", "convex", "neutral")),
        # log σ has the slope β σ(−βu), which falls everywhere.
        (DPO, Shape("concave", "concave", "averse")),
        (IPO, Shape("concave", "concave", "averse")),
        # A line up to the kink at u = 1/β.
        (partial(Hinge, beta=BETA), Shape("concave", "linear", "averse")),
        (SFT, Shape("linear", "linear", "neutral")),
        # v = u^0.88 and −2.25 (−u)^0.88.
        (HALO, Shape("concave", "convex", "averse")),
        (partial(HALO, value="where(u > 0, 2*u, u)"), Shape("linear", "linear", "seeking")),
        (partial(HALO, value="u**3"), Shape("convex", "concave", "neutral")),
        (partial(HALO, value="min(u, 1) + where(u < -2, 0.5*(u + 2), 0.0)"), Shape("concave", "concave", "averse")),
        (partial(HALO, value="where(u > 0, 2*u, 3*u) - 2*max(u - 1, 0) + 4*max(u - 5, 0)"),
         Shape("concave, then convex", "linear", "mixed")),
    ],
)  # fmt: skip
def test_the_shape_of_a_value_function(make: Any, expected: Shape) -> None:
    assert shape(make, Side.DESIRABLE) == expected


@pytest.mark.parametrize("make", [KTO, HALO, partial(KTO, reference_free=True)])
def test_an_undesirable_completion_gains_where_its_log_ratio_falls(make: Any) -> None:
    assert shape(make, Side.UNDESIRABLE) == shape(make, Side.DESIRABLE)


def test_the_clipped_surrogate_is_exponential_up_to_the_clip() -> None:
    # min(e^u, 1.5): convex, a fall of the slope to 0, flat. Of an undesirable one −max(e^−u, 0.5): concave.
    make = partial(PPO, clip_range=0.5)
    assert shape(make, Side.DESIRABLE, terms=["policy"]) == Shape("convex, then concave", "convex", "mixed")
    assert shape(make, Side.UNDESIRABLE, terms=["policy"]) == Shape("concave", "concave", "averse")


def exo_bound(beta: float, smoothing: float) -> float:
    # d/dx [p log(p/(1 − ε)) + (1 − p) log((1 − p)/ε)] = p (1 − p) (x − log((1 − ε)/ε)) at p = σ(x)
    x = np.linspace(-40, 40, 800_001)
    p = 1 / (1 + np.exp(-x))
    return float(beta * np.abs(p * (1 - p) * (x - math.log((1 - smoothing) / smoothing))).max())


@pytest.mark.parametrize(
    ("make", "side", "bounds"),
    [
        # λ β σ'(βu) is largest at u = 0, where σ' is 1/4.
        (partial(KTO, beta=BETA, desirable_weight=2.0), Side.DESIRABLE, (BETA / 2, 0)),
        (partial(KTO, beta=BETA, undesirable_weight=3.0), Side.UNDESIRABLE, (3 * BETA / 4, 0)),
        (partial(DPO, beta=BETA), Side.DESIRABLE, (BETA, BETA)),
        # −β (1 − ε) σ(−x) + β ε σ(x) goes from −(1 − ε) β to ε β.
        (partial(DPO, beta=BETA, label_smoothing=0.2), Side.DESIRABLE, (0.8 * BETA, 0.8 * BETA)),
        (partial(SimPO, beta=BETA), Side.DESIRABLE, (BETA, BETA)),
        # −log σ(βr_w) − log σ(−βr_w)/2 − log σ(−βr_l)/2
        (partial(NCAPair, beta=BETA), Side.DESIRABLE, (BETA, BETA / 2)),
        (partial(EXO, beta=BETA, label_smoothing=0.01), Side.DESIRABLE, (exo_bound(BETA, 0.01),) * 2),
        # σ(βr_w) − σ(β(r_w − r_l)): both slopes are between 0 and β/4, and either can be 0 while the other is β/4.
        (partial(APODown, beta=BETA), Side.DESIRABLE, (BETA / 4, BETA / 4)),
        (partial(IPO, beta=BETA), Side.DESIRABLE, (math.inf, math.inf)),
        # σ(−log odds ratio)/(1 − P) has no bound where both probabilities approach 1.
        (ORPO, Side.DESIRABLE, (math.inf, math.inf)),
        (SFT, Side.DESIRABLE, (1, 0)),
        # 2.25 u^0.88 is smoothed within 0.001 of 0: its slope there is (2 − 0.88) 0.001^(0.88 − 1).
        (HALO, Side.DESIRABLE, (2.25 * 1.12 * 0.001**-0.12, 0)),
        # Slopes of a ratio e^r up to the clip, in a mean over two replies; above 1 it has none for the undesirable one.
        (partial(PPO, clip_range=0.5), Side.UNDESIRABLE, (math.inf, 0)),
    ],
)
def test_the_bound_of_the_gradient(make: Any, side: Side, bounds: tuple[float, float]) -> None:
    terms = ["policy"] if getattr(make, "func", make) is PPO else None
    assert gradient_bounds(make, side, terms=terms) == pytest.approx(bounds, rel=2e-3)
