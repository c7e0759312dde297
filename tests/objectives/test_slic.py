"""SLiC-HF."""

from typing import Any

import pytest
import torch

from halos.objectives import SLiC, slic_loss
from tests.pairs import POLICY, assert_term, pairs, sums


@pytest.mark.parametrize(
    ("chosen", "rejected", "loss"),
    [
        (-3.0, -9.0, 0.0),  # ahead by more than δ
        (-3.0, -4.5, 0.0),  # ahead by just δ
        (-3.0, -4.0, 0.5),
        (-3.0, -3.0, 1.5),
        (-5.0, -3.0, 3.5),
    ],
)
def test_the_loss_by_hand(chosen: float, rejected: float, loss: float) -> None:
    found = slic_loss(torch.tensor([chosen]).double(), torch.tensor([rejected]).double(), delta=1.5)
    assert found.tolist() == [loss]


def test_only_a_pair_within_the_margin_has_a_gradient() -> None:
    chosen = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-3.0, -3.5], dtype=torch.float64, requires_grad=True)
    slic_loss(chosen, rejected).sum().backward()
    assert chosen.grad.tolist() == [0.0, -1.0]
    assert rejected.grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("delta", [0.2, 3.0])
def test_the_module_adds_the_negative_log_prob_of_each_chosen_completion(delta: float) -> None:
    batch, policy, _ = pairs()
    output = SLiC(delta=delta, lam=0.7).compute(batch, policy, None)
    hinges = [delta - (w - r) if w - r < delta else 0.0 for w, r in sums(POLICY)]
    assert any(hinges)
    assert_term(output.loss["calibration"], hinges)
    assert_term(output.loss["sft"], [-0.7 * w for w, _ in sums(POLICY)])
    torch.testing.assert_close(output.rewards, torch.tensor(sums(POLICY), dtype=torch.float64), rtol=1e-13, atol=0)


@pytest.mark.parametrize(("name", "value"), [("delta", 0.0), ("lam", -0.1)])
def test_parameters_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"loss\.{name}: expected a number"):
        SLiC(**{name: value})
