"""APO-zero and APO-down."""

import math
from typing import Any

import pytest
import torch

from halos.objectives import APODown, APOZero, apo_down_loss, apo_zero_loss
from tests.pairs import assert_term, columns, log_ratios, pairs

CHOSEN, REJECTED = columns(log_ratios())


def zero_by_hand(beta: float) -> list[float]:
    """By tanh: 1 − (1 + tanh(βr_w/2))/2 + (1 + tanh(βr_l/2))/2."""
    return [1 - math.tanh(beta * w / 2) / 2 + math.tanh(beta * r / 2) / 2 for w, r in log_ratios()]


def down_by_hand(beta: float) -> list[float]:
    return [1 + math.tanh(beta * w / 2) / 2 - math.tanh(beta * (w - r) / 2) / 2 for w, r in log_ratios()]


BOTH = [(APOZero, apo_zero_loss, zero_by_hand), (APODown, apo_down_loss, down_by_hand)]


@pytest.mark.parametrize(("kind", "loss", "by_hand"), BOTH)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_loss_by_hand(kind: type, loss: Any, by_hand: Any, beta: float) -> None:
    found = loss(CHOSEN, REJECTED, beta=beta)
    torch.testing.assert_close(found, torch.tensor(by_hand(beta), dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [apo_zero_loss, apo_down_loss])
def test_one_where_the_policy_is_the_reference(loss: Any) -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert loss(zero, zero).tolist() == [1.0] * 3


def test_zero_raises_the_chosen_and_down_lowers_it_less_than_the_rejected_falls() -> None:
    """At step 0 APO-zero's two gradients are −β/4 and β/4; of APO-down's, the chosen's cancel out."""
    for loss, towards in ((apo_zero_loss, (-0.25, 0.25)), (apo_down_loss, (0.0, 0.25))):
        chosen = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        rejected = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        gradients = torch.autograd.grad(loss(chosen, rejected, beta=1.0).sum(), (chosen, rejected))
        assert tuple(map(float, gradients)) == pytest.approx(towards, abs=1e-15)
    ahead = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    behind = torch.tensor([-1.0], dtype=torch.float64)
    assert torch.autograd.grad(apo_down_loss(ahead, behind, beta=1.0).sum(), ahead)[0] > 0


@pytest.mark.parametrize("loss", [apo_zero_loss, apo_down_loss])
def test_gradients(loss: Any) -> None:
    assert torch.autograd.gradcheck(loss, (CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()))


@pytest.mark.parametrize(("kind", "loss", "by_hand"), BOTH)
def test_the_module_passes_its_parameters_on(kind: type, loss: Any, by_hand: Any) -> None:
    batch, policy, reference = pairs()
    output = kind(beta=0.3).compute(batch, policy, reference)
    (term,) = output.loss.values()
    assert_term(term, by_hand(0.3))
    expected = 0.3 * torch.tensor(log_ratios(), dtype=torch.float64)
    torch.testing.assert_close(output.rewards, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", [APOZero, APODown])
def test_beta_is_checked(kind: type) -> None:
    with pytest.raises(ValueError, match=r"loss\.beta: expected a number in \(0, inf\), found 0"):
        kind(beta=0)
