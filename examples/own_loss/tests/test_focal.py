"""The focal loss: numbers by hand, DPO as a special case, and the promises that halos checks."""

from __future__ import annotations

import math

import pytest
import torch
from focal import Focal, focal_loss

from halos.objectives import dpo_loss
from halos.testing import check_objective

# log π_θ and log π_ref of the chosen and the rejected completion: a pair in order, one in reverse, one undecided.
POLICY = torch.tensor([[-3.0, -9.5], [-8.0, -2.0], [-1.0, -2.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-4.0, -7.25], [-5.5, -6.0], [-1.0, -2.0]], dtype=torch.float64)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_loss_by_hand(gamma: float) -> None:
    expected = []
    for margin in (1.0 + 2.25, -2.5 - 4.0, 0.0):
        p = 1 / (1 + math.exp(-0.3 * margin))
        expected.append(-((1 - p) ** gamma) * math.log(p))
    found = focal_loss(POLICY, REFERENCE, beta=0.3, gamma=gamma)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_without_focus_it_is_dpo() -> None:
    dpo = dpo_loss(POLICY[:, 0], POLICY[:, 1], REFERENCE[:, 0], REFERENCE[:, 1], beta=0.3)
    assert torch.equal(focal_loss(POLICY, REFERENCE, beta=0.3, gamma=0.0), dpo)


def test_it_keeps_every_promise() -> None:
    check_objective(Focal)


@pytest.mark.parametrize("values", [{"beta": 0.0}, {"gamma": -1.0}])
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected beta above 0 and gamma of 0 or more"):
        Focal(**values)
