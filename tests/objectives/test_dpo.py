"""DPO."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives import DPO, dpo_loss
from halos.policy.logprobs.completions import LogProbs
from halos.testing import check_objective
from tests.loop_runs import batch_of, objective_of, rows_for
from tests.pairs import POLICY, REFERENCE, assert_term, pairs

# log π_θ(y_w), log π_θ(y_l), log π_ref(y_w), log π_ref(y_l): preferences that are kept, reversed, undecided, far apart.
PAIRS = [(-3.0, -9.5, -4.0, -7.25), (-8.0, -2.0, -5.5, -6.0), (-1.0, -2.0, -1.0, -2.0), (-10.0, -900.0, -300.0, -20.0)]
COLUMNS = [torch.tensor(column, dtype=torch.float64) for column in zip(*PAIRS, strict=True)]


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_the_loss_by_hand(beta: float, epsilon: float) -> None:
    expected = []
    for policy_w, policy_l, ref_w, ref_l in PAIRS:
        margin = beta * ((policy_w - ref_w) - (policy_l - ref_l))
        expected.append((1 - epsilon) * minus_log_sigmoid(margin) + epsilon * minus_log_sigmoid(-margin))
    found = dpo_loss(*COLUMNS, beta=beta, label_smoothing=epsilon)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_log_2_where_the_policy_is_the_reference(epsilon: float) -> None:
    chosen, rejected = COLUMNS[:2]
    losses = dpo_loss(chosen, rejected, chosen, rejected, label_smoothing=epsilon)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=0, atol=1e-15)


def test_a_pair_the_wrong_way_round_costs_its_margin_more() -> None:
    chosen, rejected, ref_chosen, ref_rejected = COLUMNS
    gap = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=0.2) - dpo_loss(*COLUMNS, beta=0.2)
    torch.testing.assert_close(gap, 0.2 * ((chosen - ref_chosen) - (rejected - ref_rejected)), rtol=1e-12, atol=1e-12)


def test_label_smoothing_pulls_back_a_margin_that_is_too_wide() -> None:
    """With ε the loss is least where σ(margin) = 1 − ε; without it wider is always better."""
    epsilon = 0.2
    best = math.log((1 - epsilon) / epsilon)
    margins = torch.tensor([best - 0.5, best, best + 0.5], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(margins)
    (smooth,) = torch.autograd.grad(
        dpo_loss(margins, zero, zero, zero, beta=1.0, label_smoothing=epsilon).sum(), margins
    )
    (sharp,) = torch.autograd.grad(dpo_loss(margins, zero, zero, zero, beta=1.0).sum(), margins)
    assert smooth[0] < 0 < smooth[2]
    assert abs(smooth[1]) < 1e-15
    assert (sharp < 0).all()


def test_chosen_goes_up_and_rejected_down_by_the_same_step() -> None:
    chosen, rejected = (column.clone().requires_grad_() for column in COLUMNS[:2])
    dpo_loss(chosen, rejected, *COLUMNS[2:]).sum().backward()
    assert (chosen.grad < 0).all()
    assert torch.equal(rejected.grad, -chosen.grad)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_gradients(epsilon: float) -> None:
    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return dpo_loss(chosen, rejected, *COLUMNS[2:], beta=0.3, label_smoothing=epsilon)

    assert torch.autograd.gradcheck(loss, tuple(column.clone().requires_grad_() for column in COLUMNS[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_stay_finite(dtype: torch.dtype) -> None:
    far = torch.tensor([1e4, -1e4], dtype=dtype)
    zero = torch.zeros_like(far)
    losses = dpo_loss(far, zero, zero, zero, beta=1.0, label_smoothing=0.1)
    torch.testing.assert_close(losses, torch.tensor([1e3, 9e3], dtype=dtype))


def test_the_module_takes_branch_0_as_chosen_and_passes_its_parameters_on() -> None:
    batch = collate([Row(str(i), i, (1,), ((5,), (6,))) for i in range(len(PAIRS))])
    policy, reference = torch.stack(COLUMNS[:2], 1)[:, :, None], torch.stack(COLUMNS[2:], 1)[:, :, None]
    objective = DPO(beta=0.3, label_smoothing=0.1)
    output = objective.compute(batch, LogProbs(policy, batch.mask), LogProbs(reference, batch.mask))
    term = output.loss["dpo"]
    torch.testing.assert_close(
        term.total / term.step_count, dpo_loss(*COLUMNS, beta=0.3, label_smoothing=0.1).mean(), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(output.rewards, 0.3 * (policy - reference)[:, :, 0], rtol=1e-14, atol=0)


LENGTHS = [(3, 1), (2, 4), (1, 2), (4, 4)]
"""Tokens of both completions in tests/pairs.py."""


def margins_by_hand(*, mean: bool = False, tail: float = 1.0) -> list[tuple[float, float]]:
    """(r_w, r_l) from single tokens."""
    found = []
    for ours, theirs in zip(POLICY, REFERENCE, strict=True):
        shared = min(map(len, ours))
        sides = []
        for mine, other in zip(ours, theirs, strict=True):
            ratios = [a - b for a, b in zip(mine, other, strict=True)]
            total = math.fsum(ratios[:shared]) + tail * math.fsum(ratios[shared:])
            sides.append(total / len(ratios) if mean else total)
        found.append((sides[0], sides[1]))
    return found


@pytest.mark.parametrize(
    ("parameters", "by_hand"),
    [
        ({"length_normalised": True}, {"mean": True}),
        ({"tail_weight": 0.3}, {"tail": 0.3}),
        ({"tail_weight": 0.0, "length_normalised": True}, {"tail": 0.0, "mean": True}),
    ],
)
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_variants_of_the_log_prob_by_hand(parameters: dict[str, Any], by_hand: dict[str, Any], epsilon: float) -> None:
    batch, policy, reference = pairs()
    assert batch.mask.sum(-1).tolist() == [list(lengths) for lengths in LENGTHS]
    output = DPO(beta=0.4, label_smoothing=epsilon, **parameters).compute(batch, policy, reference)
    ratios = margins_by_hand(**by_hand)
    margins = [0.4 * (w - r) for w, r in ratios]
    losses = [(1 - epsilon) * minus_log_sigmoid(m) + epsilon * minus_log_sigmoid(-m) for m in margins]
    assert_term(output.loss["dpo"], losses)
    torch.testing.assert_close(output.rewards, 0.4 * torch.tensor(ratios, dtype=torch.float64), rtol=1e-12, atol=1e-13)


def test_a_length_penalty_asks_less_of_a_longer_chosen_completion() -> None:
    batch, policy, reference = pairs()
    output = DPO(beta=0.4, length_penalty=0.25).compute(batch, policy, reference)
    margins = [0.4 * (w - r) for w, r in margins_by_hand()]
    losses = [minus_log_sigmoid(m + 0.25 * (w - r)) for m, (w, r) in zip(margins, LENGTHS, strict=True)]
    assert_term(output.loss["dpo"], losses)


def test_margins_of_the_data_and_of_the_length_add_up() -> None:
    batch, policy, reference = pairs()
    given = [0.5, 0.0, 2.0, -1.0]
    batch.graded_bits = torch.tensor([[m, math.nan, math.nan] for m in given]).view(torch.int32)
    objective = DPO(beta=0.4, margin_weight=1.5, length_penalty=0.25)
    assert objective.needs.margins
    margins = [0.4 * (w - r) for w, r in margins_by_hand()]
    targets = [1.5 * m - 0.25 * (w - r) for m, (w, r) in zip(given, LENGTHS, strict=True)]
    losses = [minus_log_sigmoid(m - target) for m, target in zip(margins, targets, strict=True)]
    assert_term(objective.compute(batch, policy, reference).loss["dpo"], losses)


@pytest.mark.parametrize(
    ("name", "value"), [("tail_weight", 1.5), ("length_penalty", -0.1), ("margin_weight", -1), ("label_smoothing", 0.5)]
)
def test_parameters_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"loss\.{name}: expected a number"):
        DPO(**{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [{"margin_weight": 0.5}, {"tail_weight": 0.5, "length_normalised": True}])
def test_variants_keep_every_promise(parameters: dict[str, Any]) -> None:
    check_objective(partial(DPO, **parameters))


def test_wpo_by_hand() -> None:
    """w = exp(mean of log π − log Σ π²) of both completions, and the gradient of −w_w w_l log σ with w held fixed."""
    batch, policy, reference = pairs()
    policy.tokens.requires_grad_()
    policy.log_collision = torch.where(batch.mask, -0.3 - 0.1 * torch.arange(4, dtype=torch.float64), 0.0)
    term = DPO(beta=0.4, policy_weights=True).compute(batch, policy, reference).loss["dpo"]
    losses, slopes = [], []
    for pair, (w, r) in zip(POLICY, margins_by_hand(), strict=True):
        weights = [
            math.exp(math.fsum(p + 0.3 + 0.1 * t for t, p in enumerate(branch)) / len(branch)) for branch in pair
        ]
        losses.append(weights[0] * weights[1] * minus_log_sigmoid(0.4 * (w - r)))
        slopes.append(-weights[0] * weights[1] * 0.4 / (1 + math.exp(0.4 * (w - r))))
    (gradient,) = torch.autograd.grad(term.total, policy.tokens)
    expected = torch.tensor(slopes, dtype=torch.float64)[:, None] * torch.tensor([1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(gradient * batch.mask, batch.mask * expected[..., None], rtol=1e-12, atol=0)
    term.total = term.total.detach()
    assert_term(term, losses)


def test_the_run_gives_wpo_the_statistic_that_it_needs() -> None:
    """Against all probabilities of a plain forward, one completion at a time."""
    objective, rows = objective_of(DPO, policy_weights=True), rows_for(DPO, 3)
    objective.configure_model()
    output, metrics = objective.compute_batch(batch_of(objective, rows))
    weights = []
    for row in rows:
        weight = 1.0
        for branch in row.branches:
            ids = torch.tensor([row.prompt + branch])
            with torch.no_grad():
                logits = objective.trained.policy(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].double()
            logprobs = logits.log_softmax(-1)
            own = logprobs.gather(1, torch.tensor(branch)[:, None])[:, 0]
            weight *= float((own - logprobs.exp().square().sum(-1).log()).mean().exp())
        weights.append(weight)
    assert float(output.loss["dpo"].total.detach()) == pytest.approx(math.log(2) * math.fsum(weights), rel=1e-5)
    assert "log_collision" in metrics
