"""Verdicts of the paper, and counterexamples to each condition."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from halos.objectives import CSFT, DPO, KTO, PPO, SFT, APODown, BradleyTerry, Output, SimPO
from halos.theory import is_halo
from halos.theory.definition import LOG_RATIO, RATIO


@pytest.mark.parametrize(
    ("make", "terms", "reward"),
    [
        (KTO, None, LOG_RATIO),
        (partial(KTO, desirable_weight=2.0, undesirable_weight=0.5, beta=0.5), None, LOG_RATIO),
        (DPO, None, LOG_RATIO),
        (PPO, ["policy"], RATIO),
    ],
)
def test_the_human_aware_losses_of_the_paper(make: Any, terms: Any, reward: str) -> None:
    verdict = is_halo(make, terms=terms)
    assert verdict
    assert verdict.reward == reward
    assert str(verdict) == f"HALO, with reward {reward}"


@pytest.mark.parametrize("make", [SFT, CSFT, SimPO, partial(KTO, reference_free=True)])
def test_likelihoods_are_none(make: Any) -> None:
    verdict = is_halo(make)
    assert not verdict
    assert verdict.failures[0] == "the loss is not a function of π_θ/π_ref: it changes where both change alike"
    assert str(verdict).startswith("not a HALO: the loss is not a function of π_θ/π_ref")


def test_smoothed_labels_make_large_gains_a_loss() -> None:
    # The minimum of −(1 − ε) log σ(βu) − ε log σ(−βu) lies at βu = log((1 − ε)/ε).
    (failure,) = is_halo(partial(DPO, label_smoothing=0.1, beta=0.1)).failures
    assert failure == "desirable completions: the value decreases at a gain of 22.2"


@pytest.mark.long
def test_a_penalty_for_distance_makes_large_gains_a_loss() -> None:
    assert is_halo(partial(PPO, beta=0.0))
    assert any("the value decreases" in failure for failure in is_halo(partial(PPO, beta=0.1)).failures)


class ConvexInGains(DPO):
    def compute(self, batch: Any, policy: Any, reference: Any) -> Output:
        ratios = policy.sum - reference.sum
        losses = -(torch.relu(ratios[:, 0] - ratios[:, 1]) ** 2) - (ratios[:, 0] - ratios[:, 1])
        return Output({"convex": self.per_example(losses, batch)})


class NoDifference(DPO):
    def compute(self, batch: Any, policy: Any, reference: Any) -> Output:
        ratios = policy.sum - reference.sum
        return Output({"product": self.per_example(-torch.sigmoid(ratios[:, 0] * (1 + ratios[:, 1])), batch)})


class Indifferent(DPO):
    def compute(self, batch: Any, policy: Any, reference: Any) -> Output:
        return Output({"nothing": self.per_example(0 * policy.sum[:, 0], batch)})


@pytest.mark.parametrize(
    ("make", "failure"),
    [
        (ConvexInGains, "desirable completions: the value is not concave at a gain of 0.25"),
        (NoDifference, "the loss is not a function of a difference of rewards"),
        (Indifferent, "the loss does not depend on π_θ"),
        (BradleyTerry, "the loss does not depend on π_θ"),
        (APODown, "the loss is not a function of a difference of rewards"),
    ],
)
def test_each_condition_can_fail(make: Any, failure: str) -> None:
    assert failure in is_halo(make).failures
