"""DPO."""

import math

import pytest
import torch
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives import DPO, dpo_loss
from halos.policy.logprobs.completions import LogProbs

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
