"""The metrics that all objectives share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halos.data.batches.collate import Batch
from halos.metrics import TIE, Mean, mean_where
from halos.policy.logprobs.completions import LogProbs


def feedback_metrics(
    batch: Batch,
    policy: LogProbs,
    reference: LogProbs | None,
    rewards: Tensor | None,
    statistics: Sequence[str] = (),
) -> dict[str, Mean]:
    """Log-probs, rewards and KL of what people liked and disliked; ``rewards`` [B, K] if the objective implies any.

    ``statistics``: names of those that the policy's log-probs come with; their means are over scored tokens.
    """
    chosen, rejected = _sides(batch)
    sums = policy.sum.detach()
    metrics = {"logps/chosen": mean_where(sums, chosen)}
    if rejected is not None:
        metrics["logps/rejected"] = mean_where(sums, rejected)
    if rewards is not None:
        full = torch.zeros_like(sums)
        full[:, : rewards.shape[1]] = rewards.detach()
        metrics["rewards/chosen"] = mean_where(full, chosen)
        if rejected is not None:
            metrics["rewards/rejected"] = mean_where(full, rejected)
        if batch.desirable is None and rejected is not None:
            metrics["rewards/accuracies"] = _accuracy(full[:, 0], full[:, 1])
    own = chosen if rejected is None else chosen | rejected
    if reference is not None:
        metrics["kl/policy_reference"] = mean_where(sums - reference.sum, own)
    for number, name in enumerate(statistics):
        assert policy.statistics is not None
        metrics[name] = mean_where(policy.statistics[..., number], batch.mask & own[..., None])
    return metrics


def _sides(batch: Batch) -> tuple[Tensor, Tensor | None]:
    # [B, K] masks of the chosen (desirable) and of the rejected (undesirable) branches; y' is neither.
    sides = torch.zeros(batch.mask.shape[:2], dtype=torch.bool, device=batch.mask.device)
    chosen, rejected = sides.clone(), sides.clone()
    if batch.desirable is not None:
        chosen[:, 0], rejected[:, 0] = batch.desirable, ~batch.desirable
        return chosen, rejected
    chosen[:, 0] = True
    if batch.mask.shape[1] == 1:
        return chosen, None
    rejected[:, 1] = True
    return chosen, rejected


def labelled(batch: Batch, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """(rewards [n], labels [n]) of the batch's chosen and rejected completions, from rewards [B, K]."""
    if batch.desirable is not None:
        return rewards[:, 0], batch.desirable
    labels = torch.zeros_like(rewards, dtype=torch.bool)
    labels[:, 0] = True
    return rewards.flatten(), labels.flatten()


def _accuracy(chosen: Tensor, rejected: Tensor) -> Mean:
    # A tie counts half: at step 0 all rewards are equal, and the accuracy is that of a coin.
    margins = chosen - rejected
    wins = (margins > TIE).float() + 0.5 * (margins.abs() <= TIE).float()
    return Mean(wins.sum(), len(wins))
