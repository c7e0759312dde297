"""The shared metrics, on numbers small enough to work out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.loop.feedback_metrics import feedback_metrics, labelled
from halos.metrics import TIE
from halos.policy.logprobs.completions import LogProbs

CHOSEN, REJECTED, OTHER = (1, 2), (3,), (4, 5, 6)


def logprobs(sums: list[list[float]], mask: Tensor) -> LogProbs:
    """All of a completion's log-prob on its first token."""
    tokens = torch.zeros(mask.shape)
    tokens[:, :, 0] = torch.tensor(sums)
    return LogProbs(tokens, mask)


Grid = list[list[float]]


def values(rows: list[Row], policy: Grid, reference: Grid, rewards: Tensor) -> dict[str, float]:
    batch = collate(rows, mismatched=rows[0].desirable is not None)
    found = feedback_metrics(batch, logprobs(policy, batch.mask), logprobs(reference, batch.mask), rewards)
    return {name: float(mean.total / mean.count) for name, mean in found.items()}


def test_of_pairs() -> None:
    rows = [Row(str(i), i, (7, 8), (CHOSEN, REJECTED)) for i in range(4)]
    policy = [[-1.0, -5.0], [-2.0, -6.0], [-3.0, -7.0], [-4.0, -8.0]]
    reference = [[-2.0, -4.0]] * 4
    rewards = torch.tensor([[2.0, 1.0], [1.0, 2.0], [3.0, 3.0], [4.0, -1.0]])
    assert values(rows, policy, reference, rewards) == {
        "logps/chosen": -2.5,
        "logps/rejected": -6.5,
        "rewards/chosen": 2.5,
        "rewards/rejected": 1.25,
        "rewards/accuracies": 0.625,  # two wins, a tie counts half
        "log_ratio/chosen": -2.5 + 2,
        "log_ratio/rejected": -6.5 + 4,
    }


def test_pairs_whose_rewards_differ_by_rounding_are_ties() -> None:
    rows = [Row(str(i), i, (7, 8), (CHOSEN, REJECTED)) for i in range(2)]
    rewards = torch.tensor([[TIE, 0.0], [1e-3, 0.0]])
    assert values(rows, [[-1.0, -1.0]] * 2, [[-1.0, -1.0]] * 2, rewards)["rewards/accuracies"] == 0.75


def test_of_labels_the_mismatched_branch_is_neither_chosen_nor_rejected() -> None:
    rows = [Row(str(i), i, (7, 8), (CHOSEN, OTHER), desirable=i < 3) for i in range(4)]
    policy = [[-1.0, -90.0], [-2.0, -91.0], [-3.0, -92.0], [-4.0, -93.0]]
    reference = [[-2.0, -9.0]] * 4
    found = values(rows, policy, reference, torch.tensor([[1.0], [2.0], [6.0], [-4.0]]))
    assert found == {
        "logps/chosen": -2.0,
        "logps/rejected": -4.0,
        "logps/mismatched": -91.5,
        "rewards/chosen": 3.0,
        "rewards/rejected": -4.0,
        "log_ratio/chosen": 0.0,
        "log_ratio/rejected": -2.0,
        "log_ratio/mismatched": -91.5 + 9,
    }


def test_labelled_rewards_of_pairs_and_of_labels() -> None:
    rows = [Row(str(i), i, (7, 8), (CHOSEN, REJECTED)) for i in range(2)]
    rewards, labels, _ = labelled(collate(rows), torch.tensor([[2.0, 1.0], [4.0, 3.0]]))
    assert rewards.tolist() == [2.0, 1.0, 4.0, 3.0]
    assert labels.tolist() == [True, False, True, False]
    assert labels.dtype == torch.bool
    rows = [Row(str(i), i, (7, 8), (CHOSEN,), desirable=i == 1) for i in range(2)]
    rewards, labels, _ = labelled(collate(rows), torch.tensor([[2.0], [4.0]]))
    assert rewards.tolist() == [2.0, 4.0]
    assert labels.tolist() == [False, True]


def test_statistics_are_means_over_the_tokens_of_the_views_own_branches() -> None:
    def values(rows: list[Row], *, mismatched: bool = False) -> dict[str, float]:
        batch = collate(rows, mismatched=mismatched)
        policy = logprobs([[0.0] * batch.mask.shape[1]] * len(rows), batch.mask)
        places = torch.arange(1.0, 1 + batch.mask.numel()).view(batch.mask.shape)
        policy.statistics = torch.stack([places, -places], -1) * batch.mask[..., None]
        names = ("entropy", "token_accuracy")
        found = feedback_metrics(batch, policy, None, None, names)
        return {name: float(found[name].total / found[name].count) for name in names}

    # Places of 2 tokens: (1, 2), (3, –), (5, 6), (7, –).
    pairs = [Row(str(i), i, (7, 8), (CHOSEN, REJECTED)) for i in range(2)]
    assert values(pairs) == {"entropy": 24 / 6, "token_accuracy": -24 / 6}
    # Places of 3 tokens: (1, 2, –), y' (4, 5, 6), (7, 8, –), y' (10, 11, 12).
    labels = [Row(str(i), i, (7, 8), (CHOSEN, OTHER), desirable=i == 0) for i in range(2)]
    assert values(labels, mismatched=True) == {"entropy": 18 / 4, "token_accuracy": -18 / 4}


@pytest.mark.parametrize("count", [1, 3])
def test_demonstrations_have_no_rejected_side(count: int) -> None:
    batch = collate([Row(str(i), i, (7, 8), (CHOSEN,)) for i in range(count)])
    policy, reference = (logprobs([[sum_]] * count, batch.mask) for sum_ in (-1.0, -3.0))
    assert set(feedback_metrics(batch, policy, None, None)) == {"logps/chosen"}
    found = feedback_metrics(batch, policy, reference, torch.full((count, 1), 0.2))
    assert {name: float(mean.total / mean.count) for name, mean in found.items()} == pytest.approx(
        {"logps/chosen": -1.0, "rewards/chosen": 0.2, "log_ratio/chosen": 2.0}
    )
