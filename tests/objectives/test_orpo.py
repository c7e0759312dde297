"""ORPO."""

import math

import pytest
import torch

from halos.objectives import ORPO, orpo_loss
from halos.objectives.orpo import log_odds
from tests.pairs import POLICY, assert_term, columns, nll_of_chosen, pairs, sums

CHOSEN, REJECTED = columns(sums(POLICY, mean=True))


def by_hand() -> list[float]:
    """log(1 + 1/OR), with the odds ratio from probabilities (geometric means over tokens)."""
    found = []
    for pair in sums(POLICY, mean=True):
        (odds_w, odds_l) = (math.exp(mean) / (1 - math.exp(mean)) for mean in pair)
        found.append(math.log(1 + odds_l / odds_w))
    return found


def test_the_loss_by_hand() -> None:
    found = orpo_loss(CHOSEN, REJECTED)
    torch.testing.assert_close(found, torch.tensor(by_hand(), dtype=torch.float64), rtol=1e-12, atol=0)


def test_log_2_for_equal_odds() -> None:
    assert orpo_loss(CHOSEN, CHOSEN).tolist() == pytest.approx([math.log(2)] * 4, rel=1e-14)


@pytest.mark.parametrize("logp", [-1e-3, -0.5, -5.0, -30.0])
def test_log_odds_are_those_of_the_probability(logp: float) -> None:
    """The inverse of the sigmoid: log P = −log(1 + e^−odds)."""
    odds = float(log_odds(torch.tensor(logp, dtype=torch.float64)))
    assert -math.log1p(math.exp(-odds)) == pytest.approx(logp, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_and_impossible_completions_stay_finite(dtype: torch.dtype) -> None:
    sure = torch.tensor([0.0, -1e4, -1e-9], dtype=dtype, requires_grad=True)
    losses = orpo_loss(sure, sure.detach().flip(0))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert sure.grad.isfinite().all()


def test_gradients() -> None:
    assert torch.autograd.gradcheck(orpo_loss, (CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()))


def test_chosen_goes_up_and_rejected_down() -> None:
    chosen, rejected = (column.clone().requires_grad_() for column in (CHOSEN, REJECTED))
    orpo_loss(chosen, rejected).sum().backward()
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()


def test_the_module_adds_sft_on_the_chosen() -> None:
    batch, policy, _ = pairs()
    output = ORPO(beta=0.3).compute(batch, policy, None)
    assert_term(output.loss["sft"], nll_of_chosen())
    assert_term(output.loss["odds"], [0.3 * value for value in by_hand()])
    expected = 0.3 * torch.tensor(sums(POLICY, mean=True), dtype=torch.float64)
    torch.testing.assert_close(output.rewards, expected, rtol=1e-13, atol=0)


def test_beta_is_checked() -> None:
    with pytest.raises(ValueError, match=r"loss\.beta: expected a number in \[0, inf\), found -1"):
        ORPO(beta=-1)
    assert ORPO(beta=0).beta == 0.0
