"""The metrics that all objectives share: log-probs, rewards and log-ratios of the data's completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from halos.data.batches.batch import Batch
from halos.metrics import TIE, Mean, mean_where
from halos.policy.logprobs.completions import LogProbs


def feedback_metrics(
    batch: Batch, policy: LogProbs, reference: LogProbs | None, rewards: Tensor | None, statistics: Sequence[str] = ()
) -> dict[str, Mean]:
    """The shared metrics of one batch: means over its examples by weight.

    Desirable completions count as chosen, undesirable ones as rejected.

    Args:
        batch: B examples of up to K branches.
        policy, reference: log-probs, [B, K, C]; no reference for losses without one.
        rewards: the implied rewards of the first branches, [B, up to K], if the loss implies any.
        statistics: names of ``policy.statistics``, in their order. Their means are over scored tokens.
    """
    kinds = _kinds(batch)
    chosen, rejected = kinds["chosen"], kinds.get("rejected")
    sums = policy.sum.detach()
    mean = partial(mean_where, weights=batch.weights)
    metrics = {f"logps/{kind}": mean(sums, branches) for kind, branches in kinds.items()}
    if rewards is not None:
        # A loss may return the rewards of its first branches only: KTO's y' has none.
        padded = torch.zeros_like(sums)
        padded[:, : rewards.shape[1]] = rewards.detach()
        metrics["rewards/chosen"] = mean(padded, chosen)
        if rejected is not None:
            metrics["rewards/rejected"] = mean(padded, rejected)
        if batch.desirable is None and rejected is not None:
            metrics["rewards/accuracies"] = mean(*_wins(padded[:, 0], padded[:, 1]))
    if reference is not None:
        metrics |= {f"log_ratio/{kind}": mean(sums - reference.sum, branches) for kind, branches in kinds.items()}
    scored = chosen if rejected is None else chosen | rejected
    if policy.statistics is not None:
        for name, values in zip(statistics, policy.statistics.unbind(-1), strict=True):
            metrics[name] = mean(values, batch.mask & scored[..., None])
    return metrics


def _kinds(batch: Batch) -> dict[str, Tensor]:
    # [B, K] masks of the chosen (desirable), rejected (undesirable) and mismatched branches, those that the view has.
    first, others = torch.zeros(2, *batch.mask.shape[:2], dtype=torch.bool, device=batch.mask.device)
    first[:, :1], others[:, 1:] = True, True
    several = batch.mask.shape[1] > 1
    if batch.desirable is None:
        return {"chosen": first, "rejected": others} if several else {"chosen": first}
    desirable = batch.desirable[:, None]
    kinds = {"chosen": first & desirable, "rejected": first & ~desirable}
    return kinds | {"mismatched": others} if several else kinds


def labelled(batch: Batch, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (rewards [n], labels [n], weights [n]) of the batch's completions, from rewards [B, K].

    Labels are true for chosen and false for rejected completions; weights are None where all are 1.
    """
    if batch.desirable is not None:
        return rewards[:, 0], batch.desirable, batch.weights
    labels = torch.zeros_like(rewards, dtype=torch.bool)
    labels[:, 0] = True
    weights = None if batch.weights is None else batch.weights[:, None].expand_as(rewards).flatten()
    return rewards.flatten(), labels.flatten(), weights


def _wins(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    # A tie counts half: at step 0 all rewards are equal, and accuracy should start at 1/2, not at 0.
    margins = chosen - rejected
    wins = (margins > TIE).float() + 0.5 * (margins.abs() <= TIE).float()
    return wins, torch.ones_like(wins, dtype=torch.bool)
