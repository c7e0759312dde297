"""An example of weight n trains as n examples do: in a whole run, and in each statistic by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.loop.feedback_metrics import feedback_metrics, labelled
from halos.metrics import auc
from halos.objectives import BCO, CPO, KTO, PPO, SFT, Objective
from halos.objectives.bco import RewardShift
from halos.objectives.grpo import group_advantages
from halos.objectives.kto import kto_weights
from halos.objectives.ppo import whiten
from halos.policy.logprobs.completions import LogProbs
from tests.fork import run_ranks
from tests.loop_runs import OBJECTIVES, Run, assert_same, described, fit, objective_of, rows_for

WEIGHTS = (1.0, 3.0, 2.0, 2.0, 3.0, 1.0)
"""Every two neighbours weigh 4, so that micro-batches of two correspond to four repeated examples."""
SOME = (SFT, KTO, BCO, PPO, CPO)
OTHERS = tuple(kind for kind in OBJECTIVES if kind not in SOME)


def weighted(kind: type[Objective], count: int, seed: int = 0) -> list[Row]:
    rows = rows_for(kind, count, seed=seed)
    return [replace(row, weight=weight) for row, weight in zip(rows, cycle(WEIGHTS), strict=False)]


def repeated(rows: Sequence[Row]) -> list[Row]:
    return [replace(row, weight=1.0) for row in rows for _ in range(int(row.weight))]


def norm(self: LlamaRMSNorm, states: Tensor) -> Tensor:
    return self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.variance_epsilon)


def in_float64() -> Any:
    """Llama's norm in float64. transformers computes it in float32, where 3 g is not g + g + g to the last bit."""
    return mock.patch.object(LlamaRMSNorm, "forward", norm)


def train(kind: type[Objective], rows: list[Row], val: list[Row], **options: Any) -> Run:
    accumulate = 1 if described(kind).needs.whole_step else 2
    with in_float64():
        return fit(objective_of(kind, moved=0.1), rows, val=val, accumulate_grad_batches=accumulate, **options)


def train_weighted(kinds: Sequence[type[Objective]]) -> list[Run]:
    return [train(kind, weighted(kind, 8), weighted(kind, 8, seed=1), batch_size=2, ranks=2) for kind in kinds]


@pytest.mark.ranks
@pytest.mark.parametrize("kinds", [pytest.param(some, marks=pytest.mark.slow) for some in (SOME, OTHERS)])
def test_weights_on_two_ranks_and_accumulated_equal_repeated_examples(kinds: Sequence[type[Objective]]) -> None:
    for runs in zip(kinds, *run_ranks(partial(train_weighted, kinds)), strict=True):
        kind, *divided = runs
        rows, val = repeated(weighted(kind, 8)), repeated(weighted(kind, 8, seed=1))
        one = train(kind, rows, val, batch_size=8)
        for run in divided:
            assert_same(run, one)


@pytest.mark.parametrize("kind", [SFT, KTO])
def test_equal_weights_are_no_weights(kind: type[Objective]) -> None:
    rows = rows_for(kind, 4)
    alike, plain = (
        fit(objective_of(kind, moved=0.1), some, batch_size=4)
        for some in ([replace(row, weight=2.0) for row in rows], rows)
    )
    torch.testing.assert_close(alike.gradients, plain.gradients, rtol=0, atol=0)


# Statistics by hand


def metrics_of(rows: Sequence[Row], sums: Sequence[Sequence[float]]) -> tuple[dict[str, float], float | None]:
    batch = collate(rows)
    tokens = torch.zeros(batch.mask.shape, dtype=torch.float64)
    tokens[:, :, 0] = torch.tensor(sums, dtype=torch.float64)
    statistics = torch.stack([tokens], -1)
    policy = LogProbs(tokens, batch.mask, statistics=statistics)
    reference = LogProbs(tokens * 0.5, batch.mask)
    means = feedback_metrics(batch, policy, reference, policy.sum, ("entropy",))
    return {name: float(mean.total / mean.count) for name, mean in means.items()}, auc(*labelled(batch, policy.sum))


@pytest.mark.parametrize("view", ["pairs", "binary"])
def test_metrics_count_by_weight(view: str) -> None:
    weights = (1.0, 3.0, 2.0)
    branches: tuple[tuple[int, ...], ...] = ((1, 2), (3,)) if view == "pairs" else ((1, 2),)
    sums = [[-1.0, -2.0], [-5.0, -3.0], [-2.5, -4.0]]
    rows = [
        Row(str(n), n, (7,), branches, desirable=None if view == "pairs" else n != 1, weight=weight)
        for n, weight in enumerate(weights)
    ]
    own = [own[: len(branches)] for own in sums]
    copies = [values for values, weight in zip(own, weights, strict=True) for _ in range(int(weight))]
    found, area = metrics_of(rows, own)
    expected, expected_area = metrics_of(repeated(rows), copies)
    assert found == pytest.approx(expected, rel=1e-12)
    assert area == pytest.approx(expected_area, rel=1e-12)
    if view == "pairs":
        assert found["rewards/accuracies"] == 0.5
        assert found["logps/chosen"] == pytest.approx((-1 - 15 - 5) / 6)
    else:
        assert area == 1.0


def test_a_weighted_auc() -> None:
    rewards = torch.tensor([3.0, 1.0, 2.0, 1.0])
    labels = torch.tensor([True, True, False, False])
    # Pairs of weights 2·4 and 2·1 won, 0.5·1 tied, 0.5·4 lost.
    found = auc(rewards, labels, torch.tensor([2.0, 0.5, 4.0, 1.0]))
    assert found == pytest.approx((2 * 4 + 2 * 1 + 0.25) / (2.5 * 5), rel=1e-12)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_automatic_weights_count_weights() -> None:
    assert kto_weights("auto", 1.0, 0.5, 2.0) == (4.0, 1.0)


def test_the_shift_of_bco_counts_weights() -> None:
    shift = RewardShift().double()
    labels = torch.tensor([True, True, False])
    shift.update(doubles(1.0, 3.0, -2.0), labels, doubles(0.25, 0.5, 0.125))
    assert shift.means.tolist() == pytest.approx([-2.0, (0.25 + 1.5) / 0.75])
    shift.update(doubles(5.0, 5.0, 4.0), labels, doubles(0.25, 1.0, 0.125))
    assert shift.means.tolist() == pytest.approx([1.0, (0.25 + 1.5 + 1.25 + 5) / 2])
    assert shift.counts.tolist() == [0.25, 2.0]


def test_the_baseline_of_a_group_is_a_weighted_mean() -> None:
    scores, weights = doubles(1.0, 4.0, 9.0), doubles(2.0, 1.0, 5.0)
    groups = torch.tensor([0, 0, 1])
    found = group_advantages(scores, groups, scores, groups, weights)
    # Mean 2 and variance (2 · 1 + 4) / 3 of the first group; the second has one completion.
    assert found.tolist() == pytest.approx([-1 / math.sqrt(2), 2 / math.sqrt(2), 0.0], rel=1e-12)


def test_whitening_counts_the_tokens_of_a_row_by_its_weight() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    found = whiten(torch.tensor([[1.0, 99.0], [4.0, 7.0]], dtype=torch.float64), mask, doubles(3.0, 0.5))
    mean, variance = (3 + 2 + 3.5) / 4, 0.0
    for value, weight in ((1, 3), (4, 0.5), (7, 0.5)):
        variance += weight * (value - mean) ** 2 / 4
    expected = [(value - mean) / (math.sqrt(variance) + 1e-8) for value in (1, 4, 7)]
    assert found[mask].tolist() == pytest.approx(expected, rel=1e-12)
    assert found[0, 1] == 0
