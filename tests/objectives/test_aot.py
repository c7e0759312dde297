"""AOT, paired and unpaired."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from halos.objectives import AOT, AOTUnpaired, aot_loss
from halos.testing.examples import evaluate, make_inputs, make_objective, tiny_rows
from tests.objectives.uneven_ranks import assert_ranks_equal_one
from tests.pairs import POLICY, REFERENCE, assert_term, log_ratios, pairs, sums

U = torch.tensor([0.3, -2.0, 1.5, 0.9], dtype=torch.float64)
V = torch.tensor([1.0, -0.5, -3.0, 0.25], dtype=torch.float64)


def logistic(margin: float, epsilon: float = 0.0) -> float:
    return (1 - epsilon) * math.log(1 + math.exp(-margin)) + epsilon * math.log(1 + math.exp(margin))


def by_rank(u: list[float], v: list[float], beta: float, epsilon: float = 0.0) -> list[float]:
    """The loss of each u against the v of its rank."""
    of_rank = sorted(v)
    return [logistic(beta * (x - of_rank[sorted(u).index(x)]), epsilon) for x in u]


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_the_loss_by_hand(beta: float, epsilon: float) -> None:
    expected = torch.tensor(by_rank(U.tolist(), V.tolist(), beta, epsilon)).double()
    found = aot_loss(U, V, beta=beta, label_smoothing=epsilon)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_gradients() -> None:
    assert torch.autograd.gradcheck(aot_loss, (U.clone().requires_grad_(), V.clone().requires_grad_()))
    u = U.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(aot_loss(u, V, beta=1.0).sum(), u)
    slopes = [-1 / (1 + math.exp(x - y)) for x, y in zip(sorted(U.tolist()), sorted(V.tolist()), strict=True)]
    torch.testing.assert_close(gradient[U.argsort()], torch.tensor(slopes, dtype=torch.float64), rtol=1e-12, atol=0)


def test_weights_are_repetitions_and_need_not_be_whole() -> None:
    weights = torch.tensor([2.0, 1.0, 3.0, 1.0], dtype=torch.float64)
    repeated = [x.repeat_interleave(weights.long()) for x in (U, V)]
    total = (weights * aot_loss(U, V, weights, beta=1.0)).sum()
    torch.testing.assert_close(total, aot_loss(*repeated, beta=1.0).sum(), rtol=1e-12, atol=0)
    half = (weights / 2 * aot_loss(U, V, weights / 2, beta=1.0)).sum()
    torch.testing.assert_close(half, total / 2, rtol=1e-12, atol=0)


def test_the_order_of_each_side_changes_nothing() -> None:
    torch.testing.assert_close(aot_loss(U, V).sum(), aot_loss(U.flip(0), V[[2, 0, 3, 1]]).sum(), rtol=1e-14, atol=0)


def test_the_module_compares_margins_or_the_two_sides() -> None:
    batch, policy, reference = pairs()
    ours, theirs = ([w - r for w, r in sums(values)] for values in (POLICY, REFERENCE))
    paired = AOT(beta=0.3, label_smoothing=0.1).compute(batch, policy, reference)
    assert_term(paired.loss["aot"], by_rank(ours, theirs, 0.3, 0.1))
    chosen, rejected = map(list, zip(*log_ratios(), strict=True))
    unpaired = AOTUnpaired(beta=0.3).compute(batch, policy, reference)
    assert_term(unpaired.loss["aot_unpaired"], by_rank(chosen, rejected, 0.3))
    expected = 0.3 * torch.tensor(log_ratios(), dtype=torch.float64)
    for output in (paired, unpaired):
        torch.testing.assert_close(output.rewards, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", [AOT, AOTUnpaired])
def test_log_2_where_the_policy_is_the_reference(kind: Any) -> None:
    objective = make_objective(kind)
    result = evaluate(objective, make_inputs(objective, tiny_rows(objective, 3), at_reference=True))
    assert float(result.loss) == pytest.approx(math.log(2), rel=1e-12)


def test_ranks_with_unequal_numbers_of_pairs_sort_them_together() -> None:
    """Also of the unpaired version, where a rank's v are compared with another's u."""
    objective = make_objective(AOTUnpaired)
    assert_ranks_equal_one(objective, tiny_rows(objective, 5), cut=2)


@pytest.mark.parametrize("kind", [AOT, AOTUnpaired])
@pytest.mark.parametrize(("name", "value"), [("beta", 0), ("label_smoothing", 0.5)])
def test_parameters_are_checked(kind: Any, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"loss\.{name}: expected a number"):
        kind(**{name: value})
