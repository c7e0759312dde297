"""APO: Anchored Preference Optimization (D'Oosterlinck et al. 2024, arXiv 2408.06266)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from halos.config.parameters import require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output


def apo_zero_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """The APO-zero loss of each pair (equation 7 of the paper): (1 − σ(β r_w)) + σ(β r_l).

    r = log π_θ(y|x) − log π_ref(y|x), of the chosen (w) and the rejected (l) completion. The loss raises the chosen
    completion and lowers the rejected one.

    Args:
        chosen, rejected: r = log π_θ(y|x) − log π_ref(y|x), summed over the completion's tokens, in nats, [B].
        beta: β, the strength of the KL constraint.

    Returns:
        Losses [B] in (0, 2), to be averaged over pairs.
    """
    # Bounded in both log-ratios: a pair that is already far apart has almost no gradient.
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """The APO-down loss of each pair (equation 8 of the paper): σ(β r_w) + (1 − σ(β(r_w − r_l))).

    r = log π_θ(y|x) − log π_ref(y|x), of the chosen (w) and the rejected (l) completion. The loss lowers both
    completions, the rejected one more.

    Args:
        chosen, rejected: r = log π_θ(y|x) − log π_ref(y|x), summed over the completion's tokens, in nats, [B].
        beta: β, the strength of the KL constraint.

    Returns:
        Losses [B] in (0, 2), to be averaged over pairs.
    """
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))


class _APO(Objective):
    view = "pairs"
    paper = (
        "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
        "https://arxiv.org/abs/2408.06266",
    )

    def __init__(self, backbone: BackboneSource = None, *, beta: float = 0.1, **options: Unpack[LoopOptions]) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)


class APOZero(_APO):
    """APO-zero on pairs, for data whose chosen completions are better than the policy's own. No deviations.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        log_ratios = policy.sum - reference.sum
        losses = apo_zero_loss(*log_ratios.unbind(1), beta=self.beta)
        return Output(loss={"apo_zero": self.per_example(losses, batch)}, rewards=self.beta * log_ratios)


class APODown(_APO):
    """APO-down on pairs, for data whose chosen completions are worse than the policy's own. No deviations.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    # At step 0 the slopes of σ(β r_w) and of the margin are both β/4, so they cancel for the chosen completion.
    needs = Needs(moves=(0, -1))

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        log_ratios = policy.sum - reference.sum
        losses = apo_down_loss(*log_ratios.unbind(1), beta=self.beta)
        return Output(loss={"apo_down": self.per_example(losses, batch)}, rewards=self.beta * log_ratios)
