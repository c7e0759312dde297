"""rDPO."""

import math
from typing import Any

import pytest
import torch

from halos.objectives import RobustDPO, dpo_loss, robust_dpo_loss
from tests.pairs import assert_term, columns, log_ratios, pairs

CHOSEN, REJECTED = columns(log_ratios())
ZERO = torch.zeros_like(CHOSEN)


def by_hand(beta: float, epsilon: float) -> list[float]:
    """ℓ(m) + ε m' with ℓ(−m) = ℓ(m) + m: ((1 − ε) ℓ − ε (ℓ + m)) / (1 − 2ε) = ℓ − ε m / (1 − 2ε)."""
    found = []
    for r_w, r_l in log_ratios():
        m = beta * (r_w - r_l)
        found.append(math.log(1 + math.exp(-m)) - epsilon * m / (1 - 2 * epsilon))
    return found


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.45])
def test_the_loss_by_hand(beta: float, epsilon: float) -> None:
    found = robust_dpo_loss(CHOSEN, REJECTED, beta=beta, label_smoothing=epsilon)
    torch.testing.assert_close(found, torch.tensor(by_hand(beta, epsilon), dtype=torch.float64), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_under_flips_it_is_on_average_the_loss_of_the_true_preferences(epsilon: float) -> None:
    kept = robust_dpo_loss(CHOSEN, REJECTED, label_smoothing=epsilon)
    flipped = robust_dpo_loss(REJECTED, CHOSEN, label_smoothing=epsilon)
    expected = dpo_loss(CHOSEN, REJECTED, ZERO, ZERO)
    torch.testing.assert_close((1 - epsilon) * kept + epsilon * flipped, expected, rtol=1e-12, atol=0)


def test_log_2_where_the_policy_is_the_reference() -> None:
    assert robust_dpo_loss(ZERO, ZERO).tolist() == pytest.approx([math.log(2)] * 4, rel=1e-14)


def test_gradients() -> None:
    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return robust_dpo_loss(chosen, rejected, beta=0.7, label_smoothing=0.2)

    assert torch.autograd.gradcheck(loss, (CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()))


def test_the_module_passes_its_parameters_on() -> None:
    batch, policy, reference = pairs()
    output = RobustDPO(beta=0.3, label_smoothing=0.2).compute(batch, policy, reference)
    assert_term(output.loss["robust_dpo"], by_hand(0.3, 0.2))
    expected = 0.3 * torch.tensor(log_ratios(), dtype=torch.float64)
    torch.testing.assert_close(output.rewards, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("label_smoothing", 0.5), ("label_smoothing", -0.1)])
def test_parameters_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"loss\.{name}: expected a number"):
        RobustDPO(**{name: value})
