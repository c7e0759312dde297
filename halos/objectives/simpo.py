"""SimPO: Simple Preference Optimization with a Reference-Free Reward (Meng et al. 2024, arXiv 2405.14734)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.config.parameters import require_between, require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output


def simpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, gamma: Tensor | float = 0.5, alpha: float = 0.0
) -> Tensor:
    """The SimPO loss of each pair (equation 6 of the paper): −log σ(β p_w − β p_l − γ).

    p is log π_θ(y|x), averaged over the tokens of y, for the chosen (w) and the rejected (l) completion. With α ≠ 0
    this is the loss of AlphaPO (Gupta et al. 2025, arXiv 2501.03884), with (1 − exp(−α p))/α in place of p.

    Args:
        chosen, rejected: p = log π_θ(y|x), averaged over the completion's tokens, in nats, [B].
        beta: β, the scale of the reward β p.
        gamma: γ, the target margin between the rewards, a number or [B].
        alpha: α of AlphaPO's reward; 0 for SimPO.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    return -logsigmoid(beta * (shaped(chosen, alpha) - shaped(rejected, alpha)) - gamma)


def shaped(p: Tensor, alpha: float) -> Tensor:
    """AlphaPO's reward over β, (1 − exp(−α p))/α, whose limit for α = 0 is SimPO's p."""
    # The reward is constant beyond e^80, which means over tokens never reach; float32 would overflow at e^88.
    return -torch.expm1((-alpha * p).clamp(max=80.0)) / alpha if alpha else p


class SimPO(Objective):
    """SimPO on pairs, without a reference; with α, AlphaPO. No deviations from the papers.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        gamma: γ, in units of the reward, 0 or more. The authors tune γ/β, between 0 and 1.
        alpha: α of AlphaPO; above 0 the rewards of improbable completions fall faster than their log-probs.
        margin_weight: κ, 0 or more: γ + κ m takes the place of γ. Above 0 each pair of the data needs a margin m.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = ("SimPO: Simple Preference Optimization with a Reference-Free Reward", "https://arxiv.org/abs/2405.14734")
    needs = Needs(reference=False)

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 2.0,
        gamma: float = 0.5,
        alpha: float = 0.0,
        margin_weight: float = 0.0,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.gamma = require_between("gamma", gamma, 0.0)
        self.alpha = require_between("alpha", alpha, -math.inf, open_low=True)
        self.margin_weight = require_between("margin_weight", margin_weight, 0.0)
        self.needs = replace(self.needs, margins=self.margin_weight > 0)

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        # The reward is a mean over tokens, in training too: a sum would favour short completions.
        gamma = self.gamma + self.target_margins(batch, self.margin_weight)
        losses = simpo_loss(*policy.mean.unbind(1), beta=self.beta, gamma=gamma, alpha=self.alpha)
        rewards = self.beta * shaped(policy.mean, self.alpha)
        return Output(loss={"simpo": self.per_example(losses, batch)}, rewards=rewards)
