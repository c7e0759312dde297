"""IPO."""

import math

import pytest
import torch

from halos.objectives import IPO, ipo_loss
from tests.pairs import assert_term, columns, log_ratios, pairs

CHOSEN, REJECTED = columns(log_ratios(mean=True))


@pytest.mark.parametrize("beta", [0.1, 0.4, 2.0])
def test_the_loss_by_hand(beta: float) -> None:
    """Multiplied out: h² − h/β + 1/(4β²)."""
    expected = []
    for r_w, r_l in log_ratios(mean=True):
        h = r_w - r_l
        expected.append(math.fsum([h * h, -h / beta, 0.25 / beta**2]))
    found = ipo_loss(CHOSEN, REJECTED, beta=beta)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-12)


def test_the_loss_where_the_policy_is_the_reference() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert ipo_loss(zero, zero, beta=0.1).tolist() == [25.0] * 3


def test_the_margin_is_drawn_to_one_half_over_beta_from_both_sides() -> None:
    margins = torch.tensor([1.2, 1.25, 1.3], dtype=torch.float64, requires_grad=True)
    losses = ipo_loss(margins + 3, torch.full_like(margins, 3), beta=0.4)
    (gradient,) = torch.autograd.grad(losses.sum(), margins)
    torch.testing.assert_close(gradient, torch.tensor([-0.1, 0.0, 0.1], dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_module_averages_log_ratios_over_tokens() -> None:
    batch, policy, reference = pairs()
    output = IPO(beta=0.3).compute(batch, policy, reference)
    ratios = log_ratios(mean=True)
    assert_term(output.loss["ipo"], [(w - r - 1 / 0.6) ** 2 for w, r in ratios])
    expected = torch.tensor(ratios, dtype=torch.float64) * 0.3
    torch.testing.assert_close(output.rewards, expected, rtol=1e-13, atol=0)


def test_beta_is_checked() -> None:
    with pytest.raises(ValueError, match=r"loss\.beta: expected a number in \(0, inf\), found 0"):
        IPO(beta=0)


def test_margins_of_the_data_move_the_target() -> None:
    batch, policy, reference = pairs()
    given = [0.5, 0.0, 2.0, -0.25]
    batch.graded_bits = torch.tensor([[m, math.nan, math.nan] for m in given]).view(torch.int32)
    output = IPO(beta=0.5, margin_weight=0.5).compute(batch, policy, reference)
    targets = [1 + m for m in given]
    losses = [(w - r - target) ** 2 for (w, r), target in zip(log_ratios(mean=True), targets, strict=True)]
    assert_term(output.loss["ipo"], losses)


def test_a_margin_of_p_minus_1_draws_the_pair_to_the_best_log_ratio_for_a_preference_of_probability_p() -> None:
    """p (h − 1/(2β))² + (1 − p)(h + 1/(2β))² is least where the loss with the margin p − 1 is 0."""
    p, beta = 0.7, 0.4
    h = torch.tensor([(p - 0.5) / beta], dtype=torch.float64, requires_grad=True)
    mixed = p * ipo_loss(h, 0 * h, beta=beta) + (1 - p) * ipo_loss(0 * h, h, beta=beta)
    assert abs(float(torch.autograd.grad(mixed, h)[0])) < 1e-14
    assert float(ipo_loss(h, 0 * h, beta=beta, margin=p - 1).detach()) == pytest.approx(0, abs=1e-28)
