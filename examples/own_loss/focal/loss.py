"""A focal loss on pairs: DPO's loss, with less weight on pairs that the policy orders well already."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Objective, Output


def focal_loss(policy: Tensor, reference: Tensor, *, beta: float = 0.1, gamma: float = 2.0) -> Tensor:
    """The focal loss of each pair: −(1 − p)^γ log p, with p = σ(β(r_w − r_l)) and r = log π_θ(y|x) − log π_ref(y|x).

    p is the probability of the preference under the Bradley-Terry model, so that γ = 0 is DPO. The factor is that of
    focal loss for classifiers (Lin et al. 2017, arXiv 1708.02002).

    Args:
        policy, reference: log π(y|x), summed over the completion's tokens, in nats, [B, 2]: chosen, rejected.
        beta: β, the strength of the KL constraint.
        gamma: γ, how fast well ordered pairs lose their weight.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    chosen, rejected = (policy - reference).unbind(1)
    margin = beta * (chosen - rejected)
    # σ(−margin) is 1 − p, without the rounding of a difference.
    return -(torch.sigmoid(-margin) ** gamma) * logsigmoid(margin)


class Focal(Objective):
    """The focal loss on pairs of completions.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        gamma: γ, 0 or more.

    Raises:
        ValueError: a value is out of range.
    """

    view = "pairs"

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 0.1,
        gamma: float = 2.0,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        if not beta > 0 or not gamma >= 0:
            raise ValueError(f"loss: expected beta above 0 and gamma of 0 or more, found {beta} and {gamma}")
        self.beta, self.gamma = beta, gamma

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        losses = focal_loss(policy.sum, reference.sum, beta=self.beta, gamma=self.gamma)
        rewards = self.beta * (policy.sum - reference.sum)
        return Output({"focal": self.per_example(losses, batch)}, rewards)
