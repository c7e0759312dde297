"""EXO-rw: the reverse KL divergence over the scored completions of a prompt."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives import EXORewards, exo_loss, exo_rw_loss
from halos.policy.logprobs.completions import LogProbs
from halos.testing.examples import make_objective, tiny_rows
from halos.theory.tracing import trace
from tests.objectives.test_nca import GROUPS, RATIOS, SCORES, double, softmax
from tests.objectives.uneven_ranks import assert_ranks_equal_one

ONES = torch.ones(6, dtype=torch.float64)


def by_hand(beta: float, alpha: float) -> list[float]:
    """K q log(q/p) of each completion."""
    q = softmax([beta * r for r in RATIOS], GROUPS)
    p = softmax([score / alpha for score in SCORES], GROUPS)
    return [GROUPS.count(g) * a * math.log(a / b) for g, a, b in zip(GROUPS, q, p, strict=True)]


def authors(log_ratios: Tensor, scores: Tensor, *, beta: float, alpha: float) -> Tensor:
    """The loss of a prompt in the structure of the authors' ``exact_loss`` (haozheji/exact-optimization, 1278978)."""
    labels = (scores / alpha).log_softmax(0)
    estimated = (beta * log_ratios).log_softmax(0)
    return (estimated.exp() * (estimated - labels)).sum()


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.2), (2.0, 1.0)])
def test_the_loss_by_hand(alpha: float, beta: float) -> None:
    rows = [Row(str(n), g, (1,), ((5,),), None, s) for n, (g, s) in enumerate(zip(GROUPS, SCORES, strict=True))]
    batch = collate(rows)
    policy, reference = (LogProbs(values.view(-1, 1, 1), batch.mask) for values in (double(RATIOS), double([0.0] * 6)))
    output = EXORewards(alpha=alpha, beta=beta).compute(batch, policy, reference)
    term = output.loss["exo_rw"]
    assert float(term.total / term.step_count) == pytest.approx(math.fsum(by_hand(beta, alpha)) / 6, rel=1e-12)
    torch.testing.assert_close(output.rewards, beta * double(RATIOS)[:, None], rtol=1e-14, atol=0)


def test_the_mean_over_a_group_is_the_authors_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios, scores = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    groups = torch.tensor([4, 1, 1, 4, 1, 1, 4])
    losses = exo_rw_loss(ratios, scores, groups, torch.ones_like(ratios), beta=0.7, alpha=0.4)
    for group in (1, 4):
        own = groups == group
        torch.testing.assert_close(
            losses[own].mean(), authors(ratios[own], scores[own], beta=0.7, alpha=0.4), rtol=1e-12, atol=1e-14
        )


def test_of_two_completions_it_is_the_loss_of_a_pair() -> None:
    chosen, rejected, epsilon = double([0.4, -3.0]), double([-0.3, 2.0]), 0.03
    expected = exo_loss(chosen, rejected, beta=0.6, label_smoothing=epsilon)
    scores = double([math.log1p(-epsilon), math.log(epsilon)])
    for n in range(2):
        sides = torch.stack([chosen[n], rejected[n]])
        losses = exo_rw_loss(sides, scores, torch.zeros(2), torch.ones(2).double(), beta=0.6)
        torch.testing.assert_close(losses.mean(), expected[n], rtol=1e-12, atol=0)


def test_the_gradient_by_hand() -> None:
    """dKL/dr = β q (log(q/p) − KL), and K of it in the sum over a group."""
    beta, alpha = 0.7, 0.5
    ratios = double(RATIOS).requires_grad_()
    losses = exo_rw_loss(ratios, double(SCORES), torch.tensor(GROUPS), ONES, beta=beta, alpha=alpha)
    (found,) = torch.autograd.grad(losses.sum(), ratios)
    q, hand = softmax([beta * r for r in RATIOS], GROUPS), by_hand(beta, alpha)
    sums = {g: math.fsum(loss for loss, other in zip(hand, GROUPS, strict=True) if other == g) for g in set(GROUPS)}
    expected = [beta * (loss - share * sums[g]) for loss, share, g in zip(hand, q, GROUPS, strict=True)]
    torch.testing.assert_close(found, double(expected), rtol=1e-11, atol=1e-14)


def test_the_code_is_the_papers_equation() -> None:
    """KL(p_fθ ‖ p_rφ) for K = 3 (section 3.2 of 2402.00856), in value and gradient."""
    constants = {"groups": torch.zeros(3, dtype=torch.long)}
    numbers = {name: double([0.1, 0.2, 0.3]) for name in ("log_ratios", "scores")}
    numbers |= {name: double([0.3]) for name in ("beta", "alpha")}
    found = trace(partial(exo_rw_loss, weights=ONES[:3]), numbers | constants)
    ratios, scores, (beta,), (alpha,) = (found.symbols[name] for name in ("log_ratios", "scores", "beta", "alpha"))
    q, p = ([sympy.exp(value) for value in values] for values in (beta * ratios, scores / alpha))
    q, p = ([value / sum(values) for value in values] for values in (q, p))
    equation = sum(3 * a * sympy.log(a / b) for a, b in zip(q, p, strict=True))
    point = dict(zip([*ratios, *scores, beta, alpha], [0.3, -1.2, 0.5, 2.0, 0.1, -0.7, 0.8, 0.6], strict=True))
    assert float(sum(found.value).subs(point)) == pytest.approx(float(equation.subs(point)), rel=1e-12)
    for name, symbols in found.symbols.items():
        for symbol, gradient in zip(symbols, found.gradients[name], strict=True):
            expected = float(sympy.diff(equation, symbol).subs(point))
            assert float(gradient.subs(point)) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_a_weight_is_a_number_of_copies() -> None:
    ratios, scores = double([0.3, -0.4, 1.1]), double([1.0, 0.5, -1.0])
    weights, twice = double([1.0, 2.0, 1.0]), torch.tensor([0, 1, 1, 2])
    weighed = exo_rw_loss(ratios, scores, torch.zeros(3), weights)
    copied = exo_rw_loss(ratios[twice], scores[twice], torch.zeros(4), torch.ones(4).double())
    torch.testing.assert_close(weighed[twice], copied, rtol=1e-12, atol=1e-15)


def test_a_group_that_is_split_over_ranks_is_still_one_group() -> None:
    objective = make_objective(EXORewards)
    assert_ranks_equal_one(objective, tiny_rows(objective, 5), cut=1)


def test_extreme_log_ratios_and_scores_stay_finite() -> None:
    ratios = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = exo_rw_loss(ratios, torch.tensor([-1e4, 1e4]), torch.zeros(2), torch.ones(2))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert ratios.grad.isfinite().all()


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_parameters_are_checked(name: str) -> None:
    changed: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=rf"loss\.{name}: expected a number in \(0, inf\), found 0"):
        EXORewards(**changed)
