"""The hinge loss with a reference, of RSO (Liu et al. 2023, arXiv 2309.06657)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from halos.config.parameters import require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Objective, Output


def hinge_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """The hinge loss of each pair ("hinge-norm" in the paper): max(0, 1 − β(r_w − r_l)).

    r = log π_θ(y|x) − log π_ref(y|x), of the chosen (w) and the rejected (l) completion. The loss of a pair is 0 once
    its rewards β r are 1 apart.

    Args:
        chosen, rejected: r = log π_θ(y|x) − log π_ref(y|x), summed over the completion's tokens, in nats, [B].
        beta: β, the paper's γ; the loss is 0 for margins r_w − r_l of 1/β nats or more.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    return (1 - beta * (chosen - rejected)).relu()


class Hinge(Objective):
    """The hinge loss on pairs: SLiC's calibration term for log-ratios to the reference in place of log-probs.

    Deviations from the paper:
        1. RSO draws its pairs from the optimal policy by rejection sampling, and labels them with a reward model. Only
           its loss is implemented, for the pairs of the data.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, the paper's γ, above 0.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = ("Statistical Rejection Sampling Improves Preference Optimization", "https://arxiv.org/abs/2309.06657")

    def __init__(self, backbone: BackboneSource = None, *, beta: float = 0.1, **options: Unpack[LoopOptions]) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        log_ratios = policy.sum - reference.sum
        losses = hinge_loss(*log_ratios.unbind(1), beta=self.beta)
        return Output(loss={"hinge": self.per_example(losses, batch)}, rewards=self.beta * log_ratios)
