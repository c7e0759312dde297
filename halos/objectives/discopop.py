"""DiscoPOP: a discovered mixture of the logistic and the exponential loss (Lu et al. 2024, arXiv 2406.08414)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.config.parameters import require_between, require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output


def discopop_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, tau: float = 0.05) -> Tensor:
    """The DiscoPOP loss of each pair (log-ratio modulated loss): −(1 − σ(m/τ)) log σ(m) + σ(m/τ) exp(−m).

    m = β(r_w − r_l), r = log π_θ(y|x) − log π_ref(y|x), of the chosen (w) and the rejected (l) completion. For m below
    0 the loss is close to DPO's, above 0 to the exponential loss.

    Args:
        chosen, rejected: r, summed over the completion's tokens, in nats, [B].
        beta: β, the scale of the implied reward.
        tau: τ, the width of the transition from one loss to the other.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    margin = beta * (chosen - rejected)
    # A single exponential: for very negative m, exp(−m) would overflow and its factor σ(m/τ) be 0.
    exponential = torch.exp(logsigmoid(margin / tau) - margin)
    return exponential - torch.sigmoid(-margin / tau) * logsigmoid(margin)


class DiscoPOP(Objective):
    """DiscoPOP on pairs, a loss that a language model proposed. No deviations from the paper.

    The loss is not monotone: for τ = 0.05 it rises with m between −0.12 and 0.07. So the first steps lower the margins,
    and a pair that never gets over the bump stays at m = −0.12.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        tau: τ in (0, 1). For τ of 1 or more, the loss would grow exponentially with −m.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = (
        "Discovering Preference Optimization Algorithms with and for Large Language Models",
        "https://arxiv.org/abs/2406.08414",
    )
    # At step 0 the slope in m is (1 − log 2)/(4τ) − 3/4: above 0, so margins fall, for τ below 0.102.
    needs = Needs(moves=(None, None))

    def __init__(
        self, backbone: BackboneSource = None, *, beta: float = 0.1, tau: float = 0.05, **options: Unpack[LoopOptions]
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.tau = require_between("tau", tau, 0.0, 1.0, open_low=True)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        log_ratios = policy.sum - reference.sum
        losses = discopop_loss(*log_ratios.unbind(1), beta=self.beta, tau=self.tau)
        return Output(loss={"discopop": self.per_example(losses, batch)}, rewards=self.beta * log_ratios)
