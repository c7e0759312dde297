"""BCO."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives import BCO, bco_loss
from halos.objectives.bco import RewardShift
from halos.policy.logprobs.completions import LogProbs
from halos.testing.examples import evaluate, make_inputs, make_objective, tiny_rows
from tests.fork import run_ranks

POLICY = [-3.0, -8.0, -1.0, -40.0, -2.5]
REFERENCE = [-4.0, -5.5, -1.0, -20.0, -2.0]
DESIRABLE = [True, True, False, False, True]


def doubles(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_hand(beta: float, delta: float) -> list[float]:
    """Minus the log-likelihood of a logistic classifier: the odds of "desirable" are e^(βr − δ)."""
    found = []
    for policy, reference, desirable in zip(POLICY, REFERENCE, DESIRABLE, strict=True):
        odds = math.exp(policy - reference) ** beta / math.exp(delta)
        found.append(-math.log(odds / (1 + odds)) if desirable else -math.log(1 / (1 + odds)))
    return found


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("delta", [0.0, 0.4, -1.3])
def test_the_loss_by_hand(beta: float, delta: float) -> None:
    found = bco_loss(doubles(POLICY), doubles(REFERENCE), torch.tensor(DESIRABLE), delta, beta=beta)
    torch.testing.assert_close(found, doubles(by_hand(beta, delta)), rtol=1e-8, atol=1e-14)


def test_no_gradient_into_the_shift() -> None:
    policy, delta = doubles(POLICY).requires_grad_(), doubles([0.3])[0].requires_grad_()
    bco_loss(policy, doubles(REFERENCE), torch.tensor(DESIRABLE), delta).sum().backward()
    assert delta.grad is None
    assert [gradient < 0 for gradient in policy.grad.tolist()] == DESIRABLE


def test_the_shift_is_the_middle_of_the_two_running_means() -> None:
    shift = RewardShift().double()
    assert float(shift.delta()) == 0.0
    shift.update(doubles([1.0, 3.0]), torch.tensor([True, True]))
    assert float(shift.delta()) == pytest.approx(2.0)  # one side alone
    shift.update(doubles([-2.0, 5.0]), torch.tensor([False, True]))
    assert float(shift.delta()) == pytest.approx((3.0 - 2.0) / 2)
    shift.update(doubles([-5.0, 0.0, -2.0]), torch.tensor([False, True, False]))
    assert float(shift.delta()) == pytest.approx((9 / 4 - 9 / 3) / 2)


def _shift_of_rank(rewards: list[list[float]], labels: list[list[bool]]) -> list[float]:
    dist.init_process_group("gloo")
    shift = RewardShift().double()
    shift.update(doubles(rewards[dist.get_rank()]), torch.tensor(labels[dist.get_rank()]))
    return [float(shift.delta()), *shift.counts.tolist()]


@pytest.mark.ranks
def test_the_shift_is_one_over_all_ranks() -> None:
    rank = partial(_shift_of_rank, [[2.0, 4.0, -6.0], [9.0]], [[True, True, False], [True]])
    assert run_ranks(rank) == [[(5.0 - 6.0) / 2, 1, 3]] * 2


def test_the_shift_survives_lower_precision_and_a_checkpoint() -> None:
    shift = RewardShift().to(torch.bfloat16)
    assert shift.means.dtype == torch.float32
    for _ in range(300):
        shift.update(torch.tensor([1.25, -0.5]), torch.tensor([True, False]))
    assert float(shift.delta()) == pytest.approx(0.375, rel=1e-6)
    other = RewardShift().to(torch.bfloat16)
    other.load_state_dict(shift.state_dict())
    assert torch.equal(other.means, shift.means)
    assert other.counts.tolist() == [300, 300]
    other.counts += 701
    assert other.to(torch.bfloat16).counts.tolist() == [1001, 1001]  # which bfloat16 would round to 1000


def test_the_module_learns_the_shift_in_training_only() -> None:
    rows = [Row(str(i), i, (1,), ((5,),), desirable=label) for i, label in enumerate(DESIRABLE)]
    batch = collate(rows)
    policy = LogProbs(doubles(POLICY)[:, None, None], batch.mask)
    reference = LogProbs(doubles(REFERENCE)[:, None, None], batch.mask)
    objective = BCO(beta=0.3).double()
    with torch.no_grad():  # as under validation's
        assert float(objective.compute(batch, policy, reference).metrics["delta"].total) == 0.0
    assert float(objective.eval().compute(batch, policy, reference).metrics["delta"].total) == 0.0
    output = objective.train().compute(batch, policy, reference)
    delta = 0.3 * ((1.0 - 2.5 - 0.5) / 3 + (0.0 - 20.0) / 2) / 2
    assert float(output.metrics["delta"].total) == pytest.approx(delta, rel=1e-13)
    term = output.loss["bco"]
    assert float(term.total / term.step_count) == pytest.approx(math.fsum(by_hand(0.3, delta)) / 5, rel=1e-9)
    torch.testing.assert_close(output.rewards[:, 0], 0.3 * (doubles(POLICY) - doubles(REFERENCE)), rtol=1e-13, atol=0)


@pytest.mark.parametrize(("name", "z0"), [("mismatched", (0.5 + 2 - 1) / 3), ("zero", 0.0), ("per_prompt", None)])
def test_with_a_reference_point_of_kto_the_shift_is_beta_times_it(name: str, z0: float | None) -> None:
    objective = BCO(beta=0.3, reference_point=name).double()
    assert not any(key.startswith("shift.") for key in objective.state_dict())  # nothing reads it
    mismatched = objective.needs.mismatched
    branches = ((5,), (6,)) if mismatched else ((5,),)
    rows = [Row(str(i), i // 2, (1,), branches, desirable=label) for i, label in enumerate((True, True, False))]
    batch = collate(rows, mismatched=mismatched)
    y, other, ref = doubles([-3.0, -8.0, -1.0]), doubles([0.5, 2.0, -1.0]), doubles([-4.0, -5.5, -1.0])
    policy = torch.stack([y, ref + other], 1) if mismatched else y[:, None]
    reference = torch.stack([ref, ref], 1) if mismatched else ref[:, None]
    logprobs = [LogProbs(values[..., None], batch.mask) for values in (policy, reference)]
    output = objective.compute(batch, *logprobs)
    # Two completions of one prompt are each other's point, at least 0; the third has no other.
    points = [max(0.0, -8 + 5.5), 1.0, 0.0] if z0 is None else [z0] * 3
    expected = math.fsum(
        math.log1p(math.exp(-sign * 0.3 * (ratio - point)))
        for sign, ratio, point in zip((1, 1, -1), (1.0, -2.5, 0.0), points, strict=True)
    )
    term = output.loss["bco"]
    assert float(term.total / term.step_count) == pytest.approx(expected / 3, rel=1e-12)
    assert set(output.metrics) == (set() if name == "zero" else {"z0", "z0/raw"})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"reference_point": "median"}, r"loss\.reference_point: expected one of midpoint, mismatched, .*'median'"),
        ({"reference_point_steps": 3}, r"loss\.reference_point_steps: expected null with .*=midpoint, found 3"),
    ],
)
def test_reference_points_are_checked(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        BCO(**parameters)


def test_beta_is_checked() -> None:
    with pytest.raises(ValueError, match=r"loss\.beta: expected a number in \(0, inf\), found 0"):
        BCO(beta=0)


def test_its_reference_point_counts_a_step_once_that_has_ended() -> None:
    objective = make_objective(partial(BCO, reference_point="running", clamp_reference_point=False))
    inputs = make_inputs(objective, tiny_rows(objective, 4))
    assert inputs.reference is not None
    mismatched = (inputs.policy.sum - inputs.reference.sum)[:, 1].mean()
    before = [evaluate(objective, inputs).means["z0/raw"] for _ in range(2)]
    objective.end_step()
    total, count = evaluate(objective, inputs).means["z0/raw"]
    assert before == [(0.0, 4.0)] * 2
    assert total / count == pytest.approx(float(mismatched.detach()), rel=1e-12)


def test_without_a_reference_point_the_end_of_a_step_changes_nothing() -> None:
    objective = make_objective(BCO)
    inputs = make_inputs(objective, tiny_rows(objective, 4))
    objective.eval()
    before = evaluate(objective, inputs).loss
    objective.end_step()
    assert torch.equal(evaluate(objective, inputs).loss, before)
