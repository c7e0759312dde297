"""EXO: Efficient Exact Optimization (Ji et al. 2024, arXiv 2402.00856)."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.config.parameters import require_between, require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Objective, Output


def exo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.001) -> Tensor:
    """The EXO-pref loss of each pair (equation 16 of the paper): KL(q ‖ p) of two distributions over its completions.

    q = (σ(m), σ(−m)) is the policy's preference, with m = β(r_w − r_l) and r = log π_θ(y|x) − log π_ref(y|x).
    p = (1 − ε, ε) is the preference of the data. DPO minimises KL(p ‖ q) with ε = 0.

    Args:
        chosen, rejected: r of the chosen (w) and the rejected (l) completion, summed over tokens, in nats, [B].
        beta: β, the paper's β_π; the loss is least where the margin m is log((1 − ε)/ε).
        label_smoothing: ε, the probability of the rejected completion under p, above 0.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    margin = beta * (chosen - rejected)
    log_chosen, log_rejected = math.log1p(-label_smoothing), math.log(label_smoothing)
    return torch.sigmoid(margin) * (logsigmoid(margin) - log_chosen) + torch.sigmoid(-margin) * (
        logsigmoid(-margin) - log_rejected
    )


class EXO(Objective):
    """EXO on pairs: the KL divergence of DPO's cross-entropy, the other way round.

    Deviations from the paper:
        1. Pairs only: not the loss for K completions with rewards (EXO-rw).

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, the paper's β_π, above 0.
        label_smoothing: ε in (0, 1/2).

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = ("Towards Efficient Exact Optimization of Language Model Alignment", "https://arxiv.org/abs/2402.00856")

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.001,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.label_smoothing = require_between("label_smoothing", label_smoothing, 0.0, 0.5, open_low=True)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        log_ratios = policy.sum - reference.sum
        losses = exo_loss(*log_ratios.unbind(1), beta=self.beta, label_smoothing=self.label_smoothing)
        return Output(loss={"exo": self.per_example(losses, batch)}, rewards=self.beta * log_ratios)
