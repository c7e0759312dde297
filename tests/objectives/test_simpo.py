"""SimPO."""

import math
from typing import Any

import pytest
import torch

from halos.objectives import SimPO, simpo_loss
from tests.pairs import POLICY, assert_term, columns, pairs, sums

CHOSEN, REJECTED = columns(sums(POLICY, mean=True))


def by_hand(beta: float, gamma: float) -> list[float]:
    """−log P(w ≻ l) of a Bradley-Terry model in which the chosen has to win with a handicap of γ."""
    strengths = [(math.exp(beta * w), math.exp(beta * r + gamma)) for w, r in sums(POLICY, mean=True)]
    return [-math.log(w / (w + r)) for w, r in strengths]


@pytest.mark.parametrize("beta", [2.0, 0.5])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.7])
def test_the_loss_by_hand(beta: float, gamma: float) -> None:
    found = simpo_loss(CHOSEN, REJECTED, beta=beta, gamma=gamma)
    torch.testing.assert_close(found, torch.tensor(by_hand(beta, gamma), dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_pair_ahead_by_the_margin_costs_log_2() -> None:
    even = torch.tensor([-1.0], dtype=torch.float64)
    assert float(simpo_loss(even, even - 0.25, beta=2.0, gamma=0.5)) == pytest.approx(math.log(2), rel=1e-14)


def test_chosen_goes_up_and_rejected_down_by_the_same_step() -> None:
    chosen, rejected = (column.clone().requires_grad_() for column in (CHOSEN, REJECTED))
    simpo_loss(chosen, rejected).sum().backward()
    assert (chosen.grad < 0).all()
    assert torch.equal(rejected.grad, -chosen.grad)


def test_far_margins_stay_finite() -> None:
    far = torch.tensor([1e4, -1e4])
    found = simpo_loss(far, torch.zeros(2), beta=2.0, gamma=0.5)
    torch.testing.assert_close(found, torch.tensor([0.0, 2e4 + 0.5]))


def test_the_module_averages_log_probs_over_tokens() -> None:
    batch, policy, _ = pairs()
    output = SimPO(beta=1.5, gamma=0.4).compute(batch, policy, None)
    assert_term(output.loss["simpo"], by_hand(1.5, 0.4))
    expected = 1.5 * torch.tensor(sums(POLICY, mean=True), dtype=torch.float64)
    torch.testing.assert_close(output.rewards, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("alpha", [0.25, -0.5])
def test_alphapo_by_hand(alpha: float) -> None:
    """Rewards from the geometric mean q of the tokens' probabilities: (1 − q^−α)/α."""
    batch, policy, _ = pairs()
    rewards = [[1.5 * (1 - math.exp(p) ** -alpha) / alpha for p in sides] for sides in sums(POLICY, mean=True)]
    output = SimPO(beta=1.5, gamma=0.4, alpha=alpha).compute(batch, policy, None)
    assert_term(output.loss["simpo"], [math.log(1 + math.exp(0.4 - w + r)) for w, r in rewards])
    torch.testing.assert_close(output.rewards, torch.tensor(rewards, dtype=torch.float64), rtol=1e-13, atol=0)


def test_a_small_alpha_is_simpo() -> None:
    found = simpo_loss(CHOSEN, REJECTED, alpha=1e-9)
    torch.testing.assert_close(found, simpo_loss(CHOSEN, REJECTED), rtol=1e-7, atol=0)


def test_alphapo_stays_finite_where_tokens_are_nearly_impossible() -> None:
    far = torch.tensor([-1e4, -2e4], requires_grad=True)
    losses = simpo_loss(far, far.flip(0).detach(), alpha=0.25)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert far.grad.isfinite().all()


def test_margins_of_the_data_are_added_to_gamma() -> None:
    batch, policy, _ = pairs()
    given = [0.5, 0.0, 2.0, -0.25]
    batch.graded_bits = torch.tensor([[m, math.nan, math.nan] for m in given]).view(torch.int32)
    output = SimPO(beta=1.5, gamma=0.5, margin_weight=0.75).compute(batch, policy, None)
    assert_term(output.loss["simpo"], [by_hand(1.5, 0.5 + 0.75 * m)[n] for n, m in enumerate(given)])


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("gamma", -0.1), ("margin_weight", -1.0)])
def test_parameters_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"loss\.{name}: expected a number"):
        SimPO(**{name: value})
