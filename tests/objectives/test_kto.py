"""KTO."""

import logging
import math
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.loop.reference_point import reference_point
from halos.metrics import Mean
from halos.objectives import KTO, kto_loss
from halos.objectives.kto import kto_weights
from halos.policy.logprobs.completions import LogProbs
from tests.fork import run_ranks

POLICY = [-3.0, -8.0, -1.0, -40.0, -2.5]
REFERENCE = [-4.0, -5.5, -1.0, -20.0, -2.0]
DESIRABLE = [True, True, False, False, True]


def doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("z0", [0.0, 1.3])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.25, 0.5)])
def test_the_loss_by_hand(beta: float, z0: float, weights: tuple[float, float]) -> None:
    expected = []
    for policy, reference, desirable in zip(POLICY, REFERENCE, DESIRABLE, strict=True):
        r = policy - reference
        value = sigmoid(beta * (r - z0)) if desirable else sigmoid(beta * (z0 - r))
        expected.append(weights[not desirable] * (1 - value))
    found = kto_loss(
        doubles(POLICY),
        doubles(REFERENCE),
        torch.tensor(DESIRABLE),
        torch.tensor(z0, dtype=torch.float64),
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    torch.testing.assert_close(found, doubles(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("labels", [[True] * 5, [False] * 5])
def test_half_the_weight_where_the_policy_is_the_reference(labels: list[bool]) -> None:
    """One kind of feedback alone is enough."""
    losses = kto_loss(
        doubles(POLICY),
        doubles(POLICY),
        torch.tensor(labels),
        0.0,
        desirable_weight=1.5,
        undesirable_weight=0.8,
    )
    assert torch.equal(losses, torch.full_like(losses, 0.75 if labels[0] else 0.4))


def test_desirable_goes_up_and_undesirable_down() -> None:
    policy = doubles(POLICY).requires_grad_()
    kto_loss(policy, doubles(REFERENCE), torch.tensor(DESIRABLE), 0.5).sum().backward()
    assert [gradient < 0 for gradient in policy.grad.tolist()] == DESIRABLE
    assert (policy.grad != 0).all()


def test_a_weight_scales_only_its_own_side() -> None:
    loss = partial(kto_loss, doubles(POLICY), doubles(REFERENCE), torch.tensor(DESIRABLE), 0.5)
    ratio = loss(desirable_weight=3.0) / loss()
    torch.testing.assert_close(ratio, torch.where(torch.tensor(DESIRABLE), 3.0, 1.0).double(), rtol=1e-14, atol=0)


def test_gradients() -> None:
    def loss(policy: Tensor) -> Tensor:
        return kto_loss(policy, doubles(REFERENCE), torch.tensor(DESIRABLE), 0.4, beta=0.6, desirable_weight=1.3)

    assert torch.autograd.gradcheck(loss, doubles(POLICY).requires_grad_())


def test_no_gradient_into_the_reference_point() -> None:
    policy = doubles(POLICY).requires_grad_()
    z0 = doubles([0.5])[0].requires_grad_()
    kto_loss(policy, doubles(REFERENCE), torch.tensor(DESIRABLE), z0).sum().backward()
    assert z0.grad is None


@pytest.mark.parametrize(
    ("ratios", "z0", "raw"), [([1.0, 2.0, 6.0], 3.0, 3.0), ([1.0, -2.0], 0.0, -0.5), ([0.0], 0.0, 0.0)]
)
def test_the_reference_point_is_a_mean_clamped_at_zero(ratios: list[float], z0: float, raw: float) -> None:
    found, mean = mismatched_point(ratios)
    assert float(found) == pytest.approx(z0, abs=1e-15)
    assert float(mean.total / mean.count) == pytest.approx(raw, abs=1e-15)
    assert not found.requires_grad
    assert not torch.as_tensor(mean.total).requires_grad


def mismatched_point(ratios: list[float]) -> tuple[Tensor, Mean]:
    """z₀ of y' with these log-ratios, and this rank's part of the mean before the clamp."""
    batch = collate([Row(str(n), n, (1,), ((5,), (6,))) for n in range(len(ratios))], mismatched=True)
    tokens = torch.stack([torch.zeros(len(ratios)), doubles(ratios)], dim=1)[..., None].requires_grad_()
    reference = torch.full((len(ratios), 2), -7.0, dtype=torch.float64)
    z0, metrics = reference_point("mismatched")(batch, LogProbs(tokens - 7, batch.mask), reference)
    return z0, metrics["z0/raw"]


def _reference_point_of_rank(ratios: list[list[float]]) -> tuple[float, float]:
    dist.init_process_group("gloo")
    z0, raw = mismatched_point(ratios[dist.get_rank()])
    return float(z0), float(raw.total / raw.count)


@pytest.mark.ranks
def test_the_reference_point_is_one_mean_over_all_ranks() -> None:
    """Neither the mean of the ranks' means (−1) nor of their clamped means (2) would do."""
    assert run_ranks(partial(_reference_point_of_rank, [[2.0, 4.0, 6.0], [-6.0]])) == [(1.5, 1.5)] * 2


@pytest.mark.parametrize(
    ("weights", "counts", "expected"),
    [
        ((2.0, 0.5), (10, 90), (2.0, 0.5)),
        ((2.0, 0.5), (0, 90), (2.0, 0.5)),
        (("auto", "auto"), (100, 100), (1.0, 1.0)),
        (("auto", "auto"), (120, 100), (1.0, 1.0)),
        (("auto", "auto"), (100, 200), (2.0, 1.0)),
        (("auto", "auto"), (400, 100), (1.0, 3.0)),
        (("auto", 1.0), (400, 100), (1 / 3, 1.0)),
        (("auto", 2.0), (100, 100), (2.0, 2.0)),
        ((1.0, "auto"), (100, 200), (1.0, 0.5)),
        ((1.0, "auto"), (400, 100), (1.0, 3.0)),
        ((3.0, "auto"), (100, 100), (3.0, 2.25)),
    ],
)
def test_automatic_weights(weights: tuple[Any, Any], counts: tuple[int, int], expected: tuple[float, float]) -> None:
    assert kto_weights(*weights, *counts) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("auto", [("auto", "auto"), ("auto", 0.7), (1.7, "auto")])
@pytest.mark.parametrize("counts", [(1, 1000), (999, 1000), (1000, 1000), (1333, 1000), (1334, 1000), (1000, 1)])
def test_automatic_weights_keep_both_sides_in_balance(auto: tuple[Any, Any], counts: tuple[int, int]) -> None:
    desirable, undesirable = kto_weights(*auto, *counts)
    assert 1 - 1e-12 <= desirable * counts[0] / (undesirable * counts[1]) <= 4 / 3 + 1e-12
    assert all(weight in ("auto", found) for weight, found in zip(auto, (desirable, undesirable), strict=True))
    if auto == ("auto", "auto"):
        assert min(desirable, undesirable) == 1.0


@pytest.mark.parametrize("counts", [(0, 5), (5, 0)])
@pytest.mark.parametrize("auto", [("auto", 1.0), (1.0, "auto"), ("auto", "auto")])
def test_automatic_weights_need_both_kinds(auto: tuple[Any, Any], counts: tuple[int, int]) -> None:
    name = "undesirable_weight" if auto[0] == 1.0 else "desirable_weight"
    message = (
        f"loss.{name}=auto: expected both kinds of completions in the training data, found {counts[0]} desirable and "
        f"{counts[1]} undesirable ones; set loss.desirable_weight and loss.undesirable_weight to numbers"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kto_weights(*auto, *counts)


def test_the_module_resolves_its_weights_once_labels_are_known() -> None:
    objective = KTO(desirable_weight="auto")
    objective.see_labels(100, 200)
    assert (objective.desirable_weight, objective.undesirable_weight) == (2.0, 1.0)
    objective.see_labels(100, 100)
    assert objective.desirable_weight == 2.0


def test_weights_that_were_chosen_are_logged_and_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="halos"):
        KTO(desirable_weight=2.0).see_labels(100, 200)
        assert not caplog.messages
        KTO(undesirable_weight="auto").see_labels(400, 100)
    assert caplog.messages == ["KTO weights from 400 desirable and 100 undesirable completions: λ_D = 1, λ_U = 3"]


def test_the_module_scores_branch_0_against_the_reference_point_of_branch_1() -> None:
    rows = [Row(str(i), i, (1,), ((5,), (6, 7)), desirable=label) for i, label in enumerate(DESIRABLE)]
    batch = collate(rows, mismatched=True)
    mismatched = doubles([1.0, 2.0, 3.0, 0.5, 0.0])
    policy = torch.zeros(5, 2, 2, dtype=torch.float64)
    reference = torch.zeros_like(policy)
    policy[:, 0, 0], reference[:, 0, 0] = doubles(POLICY), doubles(REFERENCE)
    policy[:, 1, :] = mismatched[:, None] / 2
    policy.requires_grad_()
    objective = KTO(beta=0.3, desirable_weight=1.2, undesirable_weight=0.9)
    output = objective.compute(batch, LogProbs(policy, batch.mask), LogProbs(reference, batch.mask))
    expected = kto_loss(
        doubles(POLICY),
        doubles(REFERENCE),
        torch.tensor(DESIRABLE),
        1.3,
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.9,
    )
    term = output.loss["kto"]
    torch.testing.assert_close(term.total / term.step_count, expected.mean(), rtol=1e-13, atol=0)
    torch.testing.assert_close(output.rewards[:, 0], 0.3 * (doubles(POLICY) - doubles(REFERENCE)), rtol=1e-13, atol=0)
    assert float(output.metrics["z0"].total / output.metrics["z0"].count) == pytest.approx(1.3, rel=1e-14)
    (gradient,) = torch.autograd.grad(term.total, policy)
    assert (gradient[:, 1] == 0).all()


def test_the_modules_reference_point_is_never_below_zero() -> None:
    rows = [Row(str(i), i, (1,), ((5,), (6,)), desirable=label) for i, label in enumerate(DESIRABLE)]
    batch = collate(rows, mismatched=True)
    policy, reference = (
        torch.stack([doubles(own), doubles([y] * 5)], 1)[:, :, None] for own, y in ((POLICY, -9.0), (REFERENCE, -4.0))
    )
    output = KTO(beta=0.3).compute(batch, LogProbs(policy, batch.mask), LogProbs(reference, batch.mask))
    ratios = [p - r for p, r in zip(POLICY, REFERENCE, strict=True)]
    assert_losses(output, [0.3 * r if good else -0.3 * r for r, good in zip(ratios, DESIRABLE, strict=True)])
    assert {name: float(mean.total / mean.count) for name, mean in output.metrics.items()} == {"z0": 0, "z0/raw": -5}


def variant(policy_requires_grad: bool = False, **parameters):  # type: ignore[no-untyped-def]
    """(output, policy tokens) of a variant whose branch 1, where it has one, is y' with log-probs 1 to 5 below."""
    objective = KTO(beta=0.3, **parameters)
    branches = 2 if objective.needs.mismatched else 1
    rows = [Row(str(i), i, (1,), ((5,), (6,))[:branches], desirable=label) for i, label in enumerate(DESIRABLE)]
    batch = collate(rows, mismatched=objective.needs.mismatched)
    tokens = torch.stack([doubles(POLICY), doubles([-1.0, -2.0, -3.0, -4.0, -5.0])], 1)[:, :branches, None]
    tokens.requires_grad_(policy_requires_grad)
    reference = torch.stack([doubles(REFERENCE), doubles([-9.0] * 5)], 1)[:, :branches, None]
    expected = LogProbs(reference, batch.mask) if objective.needs.reference else None
    return objective.compute(batch, LogProbs(tokens, batch.mask), expected), tokens


def assert_losses(output, logits: list[float]) -> None:  # type: ignore[no-untyped-def]
    """The mean of 1 − σ(logit), by tanh."""
    term = output.loss["kto"]
    expected = math.fsum(0.5 - math.tanh(logit / 2) / 2 for logit in logits) / len(logits)
    assert float(term.total / term.step_count) == pytest.approx(expected, rel=1e-13)


def test_without_a_reference_point_no_other_completions_are_read() -> None:
    output, _ = variant(reference_point="zero")
    ratios = [p - r for p, r in zip(POLICY, REFERENCE, strict=True)]
    assert_losses(output, [0.3 * r if good else -0.3 * r for r, good in zip(ratios, DESIRABLE, strict=True)])
    assert not output.metrics


def test_reference_free_compares_with_the_mean_of_mismatched_log_probs() -> None:
    """r − z₀ = log π(y|x) − (−3), whatever constant a uniform reference would add to both; nothing is clamped."""
    output, tokens = variant(policy_requires_grad=True, reference_free=True)
    assert_losses(output, [0.3 * (p + 3) * (1 if good else -1) for p, good in zip(POLICY, DESIRABLE, strict=True)])
    torch.testing.assert_close(output.rewards[:, 0], 0.3 * doubles(POLICY), rtol=1e-14, atol=0)
    assert {name: float(mean.total / mean.count) for name, mean in output.metrics.items()} == {"z0": -3, "z0/raw": -3}
    (gradient,) = torch.autograd.grad(output.loss["kto"].total, tokens)
    assert (gradient[:, 1] == 0).all()
    assert [value < 0 for value in gradient[:, 0, 0].tolist()] == DESIRABLE


def test_reference_free_needs_no_reference_and_a_zero_point_no_mismatched_completions() -> None:
    assert (KTO.needs.reference, KTO.needs.mismatched) == (True, True)
    free, zero = KTO(reference_free=True), KTO(reference_point="zero")
    assert (free.needs.reference, free.needs.mismatched) == (False, True)
    assert (zero.needs.reference, zero.needs.mismatched) == (True, False)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"reference_point": "median"},
            "expected one of mismatched, zero, running, per_prompt, token, policy; found 'median'",
        ),
        (
            {"reference_point": "zero", "reference_free": True},
            "expected mismatched with loss.reference_free=true, found 'zero': log π_θ without a reference is always "
            "below 0",
        ),
    ],
)
def test_variants_are_checked(parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('loss.reference_point: ' + message)}$"):
        KTO(**parameters)


def test_automatic_weights_say_that_they_need_counts() -> None:
    assert KTO(undesirable_weight="auto").needs.label_counts
    assert not KTO().needs.label_counts
