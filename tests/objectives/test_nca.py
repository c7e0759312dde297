"""NCA and InfoNCA on scored completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives import NCA, InfoNCA, dpo_loss, group_shares, infonca_loss, nca_loss, nca_pair_loss
from halos.policy.logprobs.completions import LogProbs
from halos.testing.examples import make_objective, tiny_rows
from tests.objectives.uneven_ranks import assert_ranks_equal_one

GROUPS = [0, 0, 0, 1, 1, 2]
SCORES = [1.0, 0.5, -1.0, 2.0, 2.0, 0.0]
RATIOS = [0.3, -0.4, 1.1, -2.0, 0.7, 0.2]


def double(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softmax(values: list[float], groups: list[int], weights: list[float] | None = None) -> list[float]:
    """Each value's share in its group."""
    weights = weights or [1.0] * len(values)
    sums = [
        math.fsum(w * math.exp(v) for v, g, w in zip(values, groups, weights, strict=True) if g == group)
        for group in groups
    ]
    return [math.exp(v) / total for v, total in zip(values, sums, strict=True)]


def shares_by_hand(alpha: float) -> list[float]:
    shares = softmax([score / alpha for score in SCORES], GROUPS)
    return [GROUPS.count(group) * share for group, share in zip(GROUPS, shares, strict=True)]


def nca_by_hand(alpha: float, beta: float) -> list[float]:
    return [
        kp * math.log(1 + math.exp(-beta * r)) + math.log(1 + math.exp(beta * r))
        for kp, r in zip(shares_by_hand(alpha), RATIOS, strict=True)
    ]


def infonca_by_hand(alpha: float, beta: float) -> list[float]:
    q = softmax([beta * r for r in RATIOS], GROUPS)
    return [-kp * math.log(share) for kp, share in zip(shares_by_hand(alpha), q, strict=True)]


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_the_shares_of_scores_by_hand(alpha: float) -> None:
    scores, groups = double(SCORES) / alpha, torch.tensor(GROUPS)
    found = group_shares(scores, groups, scores, groups)
    torch.testing.assert_close(found, double(shares_by_hand(alpha)), rtol=1e-12, atol=0)


BY_HAND: Any = [(NCA, nca_by_hand), (InfoNCA, infonca_by_hand)]


@pytest.mark.parametrize(("kind", "by_hand"), BY_HAND)
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.2), (2.0, 1.0)])
def test_the_loss_by_hand(kind: Any, by_hand: Any, alpha: float, beta: float) -> None:
    rows = [Row(str(n), g, (1,), ((5,),), None, s) for n, (g, s) in enumerate(zip(GROUPS, SCORES, strict=True))]
    batch = collate(rows)
    policy, reference = (LogProbs(values.view(-1, 1, 1), batch.mask) for values in (double(RATIOS), double([0.0] * 6)))
    output = kind(alpha=alpha, beta=beta).compute(batch, policy, reference)
    (term,) = output.loss.values()
    assert float(term.total / term.step_count) == pytest.approx(math.fsum(by_hand(alpha, beta)) / 6, rel=1e-12)
    torch.testing.assert_close(output.rewards, beta * double(RATIOS)[:, None], rtol=1e-14, atol=0)


def test_gradients_by_hand() -> None:
    """dNCA/dr = β(σ(βr)(1 + K p) − K p), and dInfoNCA/dr = β K(q − p), summed over a group."""
    kp, beta, groups = double(shares_by_hand(0.5)), 0.7, torch.tensor(GROUPS)
    ratios = double(RATIOS).requires_grad_()
    (found,) = torch.autograd.grad(nca_loss(ratios, kp, beta=beta).sum(), ratios)
    sigmas = torch.sigmoid(beta * ratios).tolist()
    expected = [beta * (s * (1 + k) - k) for s, k in zip(sigmas, kp.tolist(), strict=True)]
    torch.testing.assert_close(found, double(expected), rtol=1e-12, atol=1e-14)
    (found,) = torch.autograd.grad(infonca_loss(ratios, kp, groups, torch.ones(6).double(), beta=beta).sum(), ratios)
    q = softmax([beta * r for r in RATIOS], GROUPS)
    expected = [beta * (GROUPS.count(g) * share - float(k)) for g, share, k in zip(GROUPS, q, kp, strict=True)]
    torch.testing.assert_close(found, double(expected), rtol=1e-12, atol=1e-14)


def test_for_two_completions_of_which_one_takes_all_they_are_the_losses_of_pairs() -> None:
    chosen, rejected, targets = double([0.4, -1.0]), double([-0.3, 2.0]), double([2.0, 0.0])
    zero = torch.zeros(2, dtype=torch.float64)
    for n in range(2):
        sides = torch.stack([chosen[n], rejected[n]])
        pair = nca_pair_loss(chosen, rejected, beta=0.3)[n]
        torch.testing.assert_close(nca_loss(sides, targets, beta=0.3).mean(), pair, rtol=1e-12, atol=0)
        dpo = dpo_loss(chosen, rejected, zero, zero, beta=0.3)[n]
        groups, weights = torch.zeros(2), torch.ones(2, dtype=torch.float64)
        torch.testing.assert_close(infonca_loss(sides, targets, groups, weights, beta=0.3).mean(), dpo)


def test_a_group_that_is_split_over_ranks_is_still_one_group() -> None:
    objective = make_objective(InfoNCA)
    assert_ranks_equal_one(objective, tiny_rows(objective, 5), cut=1)


@pytest.mark.parametrize("kind", [NCA, InfoNCA])
def test_extreme_log_ratios_stay_finite(kind: Any) -> None:
    ratios = torch.tensor([1e4, -1e4], requires_grad=True)
    targets, groups, weights = torch.tensor([1.9, 0.1]), torch.zeros(2), torch.ones(2)
    losses = nca_loss(ratios, targets) if kind is NCA else infonca_loss(ratios, targets, groups, weights)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert ratios.grad.isfinite().all()


@pytest.mark.parametrize("kind", [NCA, InfoNCA])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_parameters_are_checked(kind: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"loss\.{name}: expected a number in \(0, inf\), found 0"):
        kind(**{name: 0})
