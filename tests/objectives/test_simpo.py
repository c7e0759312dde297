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


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("gamma", -0.1)])
def test_parameters_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"loss\.{name}: expected a number"):
        SimPO(**{name: value})
