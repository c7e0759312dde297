"""Hinge, EXO, DiscoPOP, NCA, SPPO and BCO on pairs: losses of two log-ratios, each by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from halos.objectives import (
    EXO,
    SPPO,
    BCOPair,
    DiscoPOP,
    Hinge,
    NCAPair,
    Objective,
    bco_pair_loss,
    discopop_loss,
    exo_loss,
    hinge_loss,
    nca_pair_loss,
    sppo_loss,
)
from halos.testing import check_objective
from halos.testing.examples import evaluate, make_inputs, make_objective, tiny_rows
from tests.pairs import assert_term, columns, log_ratios, pairs

CHOSEN, REJECTED = columns(log_ratios())


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def hinge_by_hand(w: float, l: float, beta: float) -> tuple[float, float, float]:  # noqa: E741
    short = 1 - beta * (w - l)
    return max(short, 0.0), -beta * (short > 0), beta * (short > 0)


def exo_by_hand(w: float, l: float, beta: float) -> tuple[float, float, float]:  # noqa: E741
    """KL(q ‖ p), and dKL/dm = q_w q_l (log q_w/p_w − log q_l/p_l)."""
    q, p = (sigma(beta * (w - l)), sigma(-beta * (w - l))), (0.95, 0.05)
    slope = beta * q[0] * q[1] * (math.log(q[0] / p[0]) - math.log(q[1] / p[1]))
    return math.fsum(a * math.log(a / b) for a, b in zip(q, p, strict=True)), slope, -slope


def discopop_by_hand(w: float, l: float, beta: float) -> tuple[float, float, float]:  # noqa: E741
    m, tau = beta * (w - l), 0.2
    share, logistic, exponential = sigma(m / tau), math.log(1 + math.exp(-m)), math.exp(-m)
    slope = share * (1 - share) / tau * (exponential - logistic) - (1 - share) * sigma(-m) - share * exponential
    return (1 - share) * logistic + share * exponential, beta * slope, -beta * slope


def nca_by_hand(w: float, l: float, beta: float) -> tuple[float, float, float]:  # noqa: E741
    """Multiplied out: log(1 + e^−w) + w/2 + … , as −log σ(−x) = x − log σ(x)."""
    loss = 1.5 * math.log1p(math.exp(-beta * w)) + beta * w / 2 + (beta * l + math.log1p(math.exp(-beta * l))) / 2
    return loss, beta * (1.5 * sigma(beta * w) - 1), beta * sigma(beta * l) / 2


def sppo_by_hand(w: float, l: float, beta: float) -> tuple[float, float, float]:  # noqa: E741
    half = 0.5 / beta
    return w * w + l * l + 2 * half * (l - w) + 2 * half * half, 2 * (w - half), 2 * (l + half)


def bco_by_hand(w: float, l: float, beta: float) -> tuple[float, float, float]:  # noqa: E741
    loss = math.log1p(math.exp(0.2 - beta * w)) + math.log1p(math.exp(beta * l - 0.2))
    return loss, -beta * sigma(0.2 - beta * w), beta * sigma(beta * l - 0.2)


def sppo_of_pairs(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    return sppo_loss(torch.stack([chosen, rejected], 1), chosen.new_tensor([1.0, 0.0]), beta=beta).sum(1)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[float, float, float]]]] = {
    "hinge": (hinge_loss, hinge_by_hand),
    "exo": (partial(exo_loss, label_smoothing=0.05), exo_by_hand),
    "discopop": (partial(discopop_loss, tau=0.2), discopop_by_hand),
    "nca_pair": (nca_pair_loss, nca_by_hand),
    "sppo": (sppo_of_pairs, sppo_by_hand),
    "bco_pair": (partial(bco_pair_loss, delta=0.2), bco_by_hand),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_the_loss_and_its_gradient_by_hand(name: str, beta: float) -> None:
    loss, by_hand = CASES[name]
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    losses = loss(chosen, rejected, beta=beta)
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
    expected = torch.tensor([by_hand(w, l, beta) for w, l in log_ratios()], dtype=torch.float64)  # noqa: E741
    torch.testing.assert_close(torch.stack([losses, *gradients], 1), expected, rtol=1e-6, atol=1e-8)


MEMBERS: dict[str, tuple[Callable[..., Objective], float]] = {
    "hinge": (Hinge, 1.0),
    "exo": (partial(EXO, label_smoothing=0.05), -math.log(2) - math.log(0.95 * 0.05) / 2),
    "discopop": (partial(DiscoPOP, tau=0.2), (math.log(2) + 1) / 2),
    "nca_pair": (NCAPair, 2 * math.log(2)),
    "sppo": (SPPO, 2 * (0.5 / 0.3) ** 2),
    "bco_pair": (partial(BCOPair, reward_shift="zero"), 2 * math.log(2)),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_the_module_passes_its_parameters_on(name: str) -> None:
    batch, policy, reference = pairs()
    output = MEMBERS[name][0](beta=0.3).compute(batch, policy, reference)
    loss, _ = CASES[name] if name != "bco_pair" else (partial(bco_pair_loss, delta=0.0), None)
    assert_term(output.loss[name], loss(CHOSEN, REJECTED, beta=0.3).tolist())
    expected = 0.3 * torch.tensor(log_ratios(), dtype=torch.float64)
    torch.testing.assert_close(output.rewards, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", MEMBERS)
def test_the_loss_where_the_policy_is_the_reference(name: str) -> None:
    make, value = MEMBERS[name]
    objective = make_objective(make, beta=0.3)
    result = evaluate(objective, make_inputs(objective, tiny_rows(objective, 3), at_reference=True))
    assert float(result.loss) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_extreme_log_ratios_stay_finite(name: str) -> None:
    chosen, rejected = (torch.tensor([1e4, -1e4], requires_grad=True) for _ in range(2))
    losses = CASES[name][0](chosen, rejected.flip(0), beta=1.0)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


def test_exo_is_least_where_the_policys_preference_is_the_datas() -> None:
    margin = torch.tensor([math.log(0.95 / 0.05)], dtype=torch.float64, requires_grad=True)
    loss = exo_loss(margin, torch.zeros_like(margin), beta=1.0, label_smoothing=0.05)
    assert abs(float(loss.detach())) < 1e-15
    assert abs(float(torch.autograd.grad(loss, margin)[0])) < 1e-15


def test_discopop_rises_between_its_two_bends() -> None:
    """The docstring's numbers, for τ = 0.05."""
    margins = torch.tensor([-0.121, -0.117, 0.0, 0.070, 0.074], dtype=torch.float64, requires_grad=True)
    losses = discopop_loss(margins, torch.zeros_like(margins), beta=1.0)
    (slopes,) = torch.autograd.grad(losses.sum(), margins)
    assert (slopes > 0).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(("tau", "sign"), [(0.05, 1), (0.3, -1)])
def test_the_first_step_of_discopop_depends_on_tau(tau: float, sign: int) -> None:
    margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(discopop_loss(margin, margin.detach(), beta=1.0, tau=tau), margin)
    assert float(slope) == pytest.approx((1 - math.log(2)) / (4 * tau) - 0.75)
    assert sign * float(slope) > 0


def test_soft_sppo_reads_the_scores_of_both_sides() -> None:
    batch, policy, reference = pairs()
    graded = torch.tensor([[math.nan, 0.8, 0.3]] * 4)
    batch = replace(batch, graded_bits=graded.view(torch.int32))
    output = SPPO(beta=0.2, soft=True).compute(batch, policy, reference)
    losses = [(w - 0.3 / 0.2) ** 2 + (l + 0.2 / 0.2) ** 2 for w, l in log_ratios()]  # noqa: E741
    assert float(output.loss["sppo"].total) == pytest.approx(math.fsum(losses), rel=1e-6)  # scores are float32


@pytest.mark.long
@pytest.mark.parametrize("make", [partial(SPPO, soft=True), partial(BCOPair, reward_shift="zero")])
def test_the_variants_keep_every_promise(make: Any) -> None:
    check_objective(make)


def test_the_shift_of_pairs_is_half_way_between_the_mean_rewards_of_both_sides() -> None:
    objective = make_objective(BCOPair)
    inputs = make_inputs(objective, tiny_rows(objective, 4))
    output = evaluate(objective, inputs).output
    rewards = 0.1 * (inputs.policy.sum - inputs.reference.sum).detach()
    delta = (rewards[:, 0].mean() + rewards[:, 1].mean()) / 2
    assert float(output.metrics["delta"].total) == pytest.approx(float(delta), rel=1e-6)
    expected = bco_pair_loss(rewards[:, 0], rewards[:, 1], delta, beta=1.0).sum()
    assert float(output.loss["bco_pair"].total.detach()) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "parameters", "key"),
    [
        *((kind, {"beta": 0}, "beta") for kind in (Hinge, EXO, DiscoPOP, NCAPair, SPPO, BCOPair)),
        (EXO, {"label_smoothing": 0.0}, "label_smoothing"),
        (DiscoPOP, {"tau": 1.0}, "tau"),
        (BCOPair, {"reward_shift": "none"}, "reward_shift"),
    ],
)
def test_parameters_are_checked(kind: Any, parameters: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"loss\.{key}: expected"):
        kind(**parameters)
