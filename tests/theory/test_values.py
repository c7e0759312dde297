"""Value curves against the formulas of the papers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest

from halos.objectives import CSFT, DPO, KTO, PPO, SFT
from halos.theory import ImpliedLoss, Side, sides, value_curve
from tests.loop_runs import objective_of

GAINS = [-30.0, -2.0, 0.0, 0.5, 3.0, 30.0]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_kto_values_completions_by_a_logistic_function_of_their_gain() -> None:
    make = partial(KTO, beta=0.2, desirable_weight=1.5, undesirable_weight=0.75)
    liked, disliked = (value_curve(make, side, GAINS) for side in Side)
    assert liked == pytest.approx([1.5 * (sigma(0.2 * gain) - 0.5) for gain in GAINS], abs=1e-12)
    assert disliked == pytest.approx([0.75 * (sigma(-0.2 * gain) - 0.5) for gain in GAINS], abs=1e-12)


def test_dpo_values_the_chosen_by_a_log_logistic_function_of_the_margin() -> None:
    found = value_curve(partial(DPO, beta=0.3), Side.DESIRABLE, GAINS)
    assert found == pytest.approx([math.log(sigma(0.3 * gain)) - math.log(0.5) for gain in GAINS], abs=1e-12)


@pytest.mark.parametrize(("side", "sign"), [(Side.DESIRABLE, 1), (Side.UNDESIRABLE, -1)])
def test_ppo_clip_values_ratios_up_to_the_clip(side: Side, sign: int) -> None:
    gains = [-3.0, -0.3, 0.0, 0.3, 3.0]
    found = value_curve(partial(PPO, clip_range=0.5), side, gains, terms=["policy"], others=0.0)
    clipped = [min(math.exp(g), 1.5) if sign > 0 else -max(math.exp(g), 0.5) for g in gains]
    # The mean over two tokens whose whitened advantages are 1 and −1.
    assert found == pytest.approx([(value - sign) / 2 for value in clipped], abs=1e-6)


def test_the_likelihood_has_no_reference_point() -> None:
    loss = ImpliedLoss(SFT, Side.DESIRABLE)
    assert loss(2.0, shift=1.0) == pytest.approx(2.0, abs=1e-12)  # −(−5 + 1 + 2)
    assert loss(2.0) == pytest.approx(3.0, abs=1e-12)


@pytest.mark.parametrize(("kind", "count"), [(SFT, 1), (DPO, 1), (CSFT, 2), (KTO, 2), (PPO, 2)])
def test_only_labels_and_scores_have_two_sides(kind: Any, count: int) -> None:
    assert sides(objective_of(kind)) == tuple(Side)[:count]


def test_a_term_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="terms: expected some of policy, critic, kl_penalty; found"):
        ImpliedLoss(PPO, Side.DESIRABLE, ["clip"])(0.0)
