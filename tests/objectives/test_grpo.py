"""Offline GRPO."""

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from halos.data.batches.collate import Batches, collate
from halos.data.batches.order import MicroBatch
from halos.data.rows.token_rows import Row
from halos.objectives import GRPO, group_advantages, grpo_loss
from halos.policy.logprobs.completions import LogProbs

SCORES = [1.0, 4.0, -1.0, 0.5, 2.5, 2.5, 7.0]
GROUPS = [5, 3, 5, 5, 2, 2, 9]
LENGTHS = [2, 1, 3, 2, 1, 4, 2]
MASK = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
_generator = torch.Generator().manual_seed(2)
REFERENCE = -3 * torch.rand(7, 4, dtype=torch.float64, generator=_generator)
POLICY = REFERENCE + 0.5 * torch.randn(7, 4, dtype=torch.float64, generator=_generator)


def doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def advantages_by_hand() -> list[float]:
    """z-scores by the standard library; 0 for 3 and 9, which are alone, and for 2, whose scores are equal."""
    of_five = [1.0, -1.0, 0.5]
    mean, deviation = statistics.fmean(of_five), statistics.pstdev(of_five)
    return [(s - mean) / deviation if g == 5 else 0.0 for s, g in zip(SCORES, GROUPS, strict=True)]


def terms_by_hand(advantages: list[float], clip: float) -> tuple[list[float], list[float]]:
    policy, penalty = [], []
    for b, (length, advantage) in enumerate(zip(LENGTHS, advantages, strict=True)):
        ratios = [math.exp(float(POLICY[b, t] - REFERENCE[b, t])) for t in range(length)]
        # A positive advantage is worth no more past 1 + c, a negative one no less below 1 − c.
        kept = [min(ratio, 1 + clip) if advantage > 0 else max(ratio, 1 - clip) for ratio in ratios]
        policy.append(-advantage * math.fsum(kept) / length)
        penalty.append(math.fsum(ratio * math.log(ratio) + 1 - ratio for ratio in ratios) / length)
    return policy, penalty


def test_advantages_by_hand() -> None:
    scores, groups = doubles(SCORES), torch.tensor(GROUPS)
    found = group_advantages(scores, groups, scores, groups)
    torch.testing.assert_close(found, doubles(advantages_by_hand()), rtol=1e-13, atol=0)


def test_advantages_come_from_the_whole_step() -> None:
    """Those asked for may be part of it."""
    scores, groups = doubles(SCORES), torch.tensor(GROUPS)
    found = group_advantages(scores[2:4], groups[2:4], scores, groups)
    torch.testing.assert_close(found, doubles(advantages_by_hand())[2:4], rtol=1e-13, atol=0)


def test_equal_scores_that_do_not_add_up_exactly_prefer_nothing() -> None:
    scores = torch.full((3,), 0.1)
    assert group_advantages(scores, torch.zeros(3), scores, torch.zeros(3)).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([100.0, 100.0001], [0.0, 0.0]), ([1.5e-6, -1.5e-6], [1.0, -1.0]), ([100.0, 100.001], [-1.0, 1.0])],
)
def test_what_counts_as_rounding_is_relative_to_the_scores(scores: list[float], expected: list[float]) -> None:
    group = torch.zeros(2)
    assert group_advantages(doubles(scores), group, doubles(scores), group).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("clip", [0.2, 0.6])
def test_the_losses_by_hand(clip: float) -> None:
    advantages = [1.5, -0.7, 2.0, -1.0, 0.3, -2.2, 0.9]
    found = grpo_loss(POLICY - REFERENCE, doubles(advantages), MASK, clip_range=clip)
    for mine, expected in zip(found, terms_by_hand(advantages, clip), strict=True):
        torch.testing.assert_close(mine, doubles(expected), rtol=1e-12, atol=1e-14)


def test_what_lies_behind_the_mask_changes_nothing() -> None:
    ratios = (POLICY - REFERENCE).masked_fill(~MASK, 800.0).requires_grad_()
    found = grpo_loss(ratios, doubles(SCORES), MASK)
    for mine, expected in zip(found, grpo_loss(POLICY - REFERENCE, doubles(SCORES), MASK), strict=True):
        assert torch.equal(mine, expected)
    sum(term.sum() for term in found).backward()
    assert (ratios.grad[~MASK] == 0).all()


def test_gradients() -> None:
    def loss(ratios: Tensor) -> tuple[Tensor, Tensor]:
        return grpo_loss(ratios, doubles(SCORES), MASK)

    assert torch.autograd.gradcheck(loss, (POLICY - REFERENCE).requires_grad_())


def rows(groups: list[int]) -> list[Row]:
    made = zip(groups, SCORES, LENGTHS, strict=True)
    return [
        Row(str(b), group, (1,), (tuple(range(2, 2 + length)),), desirable=score > 0, score=score)
        for b, (group, score, length) in enumerate(made)
    ]


def compute(objective: GRPO, batch, indices: list[int]):  # type: ignore[no-untyped-def]
    width = batch.mask.shape[2]
    policy, reference = ((values * MASK)[indices, None, :width] for values in (POLICY, REFERENCE))
    return objective.compute(batch, LogProbs(policy, batch.mask), LogProbs(reference, batch.mask))


def test_the_module_weighs_and_averages_the_terms_over_completions() -> None:
    output = compute(GRPO(beta=0.3, clip_range=0.4), collate(rows(GROUPS)), list(range(7)))
    policy, penalty = terms_by_hand(advantages_by_hand(), 0.4)
    for name, weight, values in (("policy", 1.0, policy), ("kl_penalty", 0.3, penalty)):
        term = output.loss[name]
        assert float(term.total / term.step_count) == pytest.approx(weight * math.fsum(values) / 7, rel=1e-12)
    torch.testing.assert_close(output.rewards[:, 0], 0.3 * ((POLICY - REFERENCE) * MASK).sum(1), rtol=1e-12, atol=1e-14)


def test_micro_batches_have_the_advantages_of_the_step() -> None:
    batches = Batches(rows(GROUPS))
    parts = [[0, 1, 2], [3, 4, 5, 6]]
    objective = GRPO()
    whole = compute(objective, collate(rows(GROUPS)), list(range(7)))
    found = [compute(objective, batches[MicroBatch(tuple(part), tuple(range(7)))], part) for part in parts]
    for name, term in whole.loss.items():
        assert sum(float(part.loss[name].total) for part in found) == pytest.approx(float(term.total), rel=1e-12)
        assert {part.loss[name].step_count for part in found} == {7}


@pytest.mark.parametrize(
    ("step", "incomplete"),
    [
        ([0, 2, 3, 4, 5], 0),
        ([0, 1, 2, 3, 6], 2),  # two that are alone with their prompt
        ([0, 2, 4, 5], 2),  # one of three was cut off
        ([0, 4], 2),
    ],
)
def test_completions_without_their_group_are_counted(step: list[int], incomplete: int) -> None:
    batch = Batches(rows(GROUPS))[MicroBatch(tuple(step), tuple(step))]
    metric = compute(GRPO(), batch, step).metrics["groups/incomplete"]
    assert (int(metric.total), metric.count) == (incomplete, len(step))


@pytest.mark.parametrize(("name", "value"), [("beta", -0.1), ("clip_range", 0.0), ("clip_range", 1.0)])
def test_parameters_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"loss\.{name}: expected a number"):
        GRPO(**{name: value})
