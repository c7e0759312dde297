"""CPO."""

import math
from typing import Any

import pytest
import torch

from halos.objectives import CPO, cpo_loss, dpo_loss
from tests.pairs import POLICY, assert_term, columns, nll_of_chosen, pairs, sums

CHOSEN, REJECTED = columns(sums(POLICY))


def by_hand(beta: float) -> list[float]:
    """log(1 + (π_l / π_w)^β), from probabilities."""
    return [math.log(1 + (math.exp(r) / math.exp(w)) ** beta) for w, r in sums(POLICY)]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_loss_by_hand(beta: float) -> None:
    found = cpo_loss(CHOSEN, REJECTED, beta=beta)
    torch.testing.assert_close(found, torch.tensor(by_hand(beta), dtype=torch.float64), rtol=1e-12, atol=0)


def test_it_is_dpo_with_a_uniform_reference() -> None:
    uniform = torch.full_like(CHOSEN, -7.0)
    torch.testing.assert_close(
        cpo_loss(CHOSEN, REJECTED), dpo_loss(CHOSEN, REJECTED, uniform, uniform), rtol=1e-13, atol=0
    )


def test_chosen_goes_up_and_rejected_down_by_the_same_step() -> None:
    chosen, rejected = (column.clone().requires_grad_() for column in (CHOSEN, REJECTED))
    cpo_loss(chosen, rejected).sum().backward()
    assert (chosen.grad < 0).all()
    assert torch.equal(rejected.grad, -chosen.grad)


def test_the_module_adds_sft_on_the_chosen() -> None:
    batch, policy, _ = pairs()
    output = CPO(beta=0.3, alpha=0.6).compute(batch, policy, None)
    assert_term(output.loss["prefer"], by_hand(0.3))
    assert_term(output.loss["sft"], [0.6 * value for value in nll_of_chosen()])
    expected = 0.3 * torch.tensor(sums(POLICY), dtype=torch.float64)
    torch.testing.assert_close(output.rewards, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("alpha", -0.1)])
def test_parameters_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"loss\.{name}: expected a number"):
        CPO(**{name: value})
