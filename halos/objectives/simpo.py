"""SimPO: Simple Preference Optimization with a Reference-Free Reward (Meng et al. 2024, arXiv 2405.14734)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.config.parameters import require_between, require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, gamma: float = 0.5) -> Tensor:
    """The SimPO loss of each pair (equation 6 of the paper): −log σ(β p_w − β p_l − γ).

    p is log π_θ(y|x), averaged over the tokens of y, of the chosen (w) and the rejected (l) completion.

    Args:
        chosen, rejected: p = log π_θ(y|x), averaged over the completion's tokens, in nats, [B].
        beta: β, the scale of the reward β p.
        gamma: γ, the target margin between the rewards.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    return -logsigmoid(beta * (chosen - rejected) - gamma)


class SimPO(Objective):
    """SimPO on pairs, without a reference. No deviations from the paper.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        gamma: γ, in units of the reward, 0 or more. The authors tune γ/β, between 0 and 1.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = ("SimPO: Simple Preference Optimization with a Reference-Free Reward", "https://arxiv.org/abs/2405.14734")
    needs = Needs(reference=False)

    def __init__(
        self, backbone: BackboneSource = None, *, beta: float = 2.0, gamma: float = 0.5, **options: Unpack[LoopOptions]
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.gamma = require_between("gamma", gamma, 0.0)

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        # Means over tokens, for training as for the reward: a sum would favour short completions.
        losses = simpo_loss(*policy.mean.unbind(1), beta=self.beta, gamma=self.gamma)
        return Output(loss={"simpo": self.per_example(losses, batch)}, rewards=self.beta * policy.mean)
