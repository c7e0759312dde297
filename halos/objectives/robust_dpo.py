"""rDPO: Provably Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.config.parameters import require_between, require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Objective, Output


def robust_dpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """The rDPO loss of each pair: ((1 − ε) ℓ(m) − ε ℓ(−m)) / (1 − 2ε), with ℓ = −log σ and m = β(r_w − r_l).

    r = log π_θ(y|x) − log π_ref(y|x), of the chosen (w) and the rejected (l) completion. If preferences are flipped
    with probability ε, the expectation of the loss is DPO's loss on the true preferences. So it is unbiased, unlike
    cDPO's loss, and it can be negative.

    Args:
        chosen, rejected: r = log π_θ(y|x) − log π_ref(y|x), summed over the completion's tokens, in nats, [B].
        beta: β, the strength of the KL constraint.
        label_smoothing: ε in [0, 1/2), the probability that a recorded preference is flipped.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    margin = beta * (chosen - rejected)
    as_recorded, flipped = -logsigmoid(margin), -logsigmoid(-margin)
    # The flipped loss is subtracted, not added as in cDPO: in expectation this removes the effect of wrong labels.
    return ((1 - label_smoothing) * as_recorded - label_smoothing * flipped) / (1 - 2 * label_smoothing)


class RobustDPO(Objective):
    """rDPO on pairs whose preferences are flipped at a known rate. No deviations from the paper.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        label_smoothing: ε in [0, 1/2). At 0 the loss is DPO's.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = ("Provably Robust DPO: Aligning Language Models with Noisy Feedback", "https://arxiv.org/abs/2403.00409")

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.1,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.label_smoothing = require_between("label_smoothing", label_smoothing, 0.0, 0.5)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        log_ratios = policy.sum - reference.sum
        losses = robust_dpo_loss(*log_ratios.unbind(1), beta=self.beta, label_smoothing=self.label_smoothing)
        return Output(loss={"robust_dpo": self.per_example(losses, batch)}, rewards=self.beta * log_ratios)
