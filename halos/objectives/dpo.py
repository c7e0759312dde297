"""DPO: Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.config.parameters import require_between, require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Objective, Output


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The DPO loss of each pair (equation 7 of the paper): −log σ(β(r_w − r_l)), r = log π_θ(y|x) − log π_ref(y|x).

    w is the chosen completion and l the rejected one. With ε > 0 this is the loss of cDPO (Mitchell 2023):
    −(1 − ε) log σ(β(r_w − r_l)) − ε log σ(−β(r_w − r_l)).

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: log π(y|x), summed over the completion's
            tokens, in nats, [B].
        beta: β, the strength of the KL constraint.
        label_smoothing: ε, the probability that a recorded preference is the wrong way round.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    r_w = policy_chosen - reference_chosen
    r_l = policy_rejected - reference_rejected
    margin = beta * (r_w - r_l)
    # Not log(sigmoid(m)), which is −inf for margins below about −88 in float32.
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


class DPO(Objective):
    """DPO on pairs of a chosen and a rejected completion. No deviations from the paper.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        label_smoothing: ε in [0, 1/2). Above 0 the loss is cDPO's.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = (
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "https://arxiv.org/abs/2305.18290",
    )

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.label_smoothing = require_between("label_smoothing", label_smoothing, 0.0, 0.5)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        # Branch 0 of a pair is the chosen completion, branch 1 the rejected one.
        sides = (*policy.sum.unbind(1), *reference.sum.unbind(1))
        losses = dpo_loss(*sides, beta=self.beta, label_smoothing=self.label_smoothing)
        return Output(loss={"dpo": self.per_example(losses, batch)}, rewards=self.beta * (policy.sum - reference.sum))
