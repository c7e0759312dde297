"""SLiC-HF: Sequence Likelihood Calibration with Human Feedback (Zhao et al. 2023, arXiv 2305.10425)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from halos.config.parameters import require_between, require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output


def slic_loss(chosen: Tensor, rejected: Tensor, *, delta: float = 1.0) -> Tensor:
    """The rank calibration loss of each pair: max(0, δ − log P_θ(y⁺|x) + log P_θ(y⁻|x)).

    y⁺ is the chosen completion and y⁻ the rejected one. SLiC's whole loss adds −λ log P_θ(y_ref|x), where y_ref is the
    chosen completion. All log-probs are sums over tokens, and both terms are averaged over pairs.

    Args:
        chosen, rejected: log P_θ(y|x), summed over the completion's tokens, in nats, [B].
        delta: δ, the margin in nats above which the loss of a pair is 0.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    return (delta - chosen + rejected).relu()


class SLiC(Objective):
    """SLiC-HF on pairs, without a reference: loss = calibration − λ log P_θ(y_ref|x).

    Both terms are means over examples: log P_θ(y_ref|x) is a sum over tokens, as are the log-probs in the calibration
    term. The loss has no β; the logged rewards are log P_θ(y|x).

    Deviations from the paper:
        1. y_ref of the regularisation term is the chosen completion (as in HALOs), not a separate SFT target.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        delta: δ, above 0.
        lam: λ, the weight of the regularisation term, 0 or more.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = ("SLiC-HF: Sequence Likelihood Calibration with Human Feedback", "https://arxiv.org/abs/2305.10425")
    needs = Needs(reference=False)

    def __init__(
        self, backbone: BackboneSource = None, *, delta: float = 1.0, lam: float = 0.1, **options: Unpack[LoopOptions]
    ) -> None:
        super().__init__(backbone, **options)
        self.delta = require_positive("delta", delta)
        self.lam = require_between("lam", lam, 0.0)

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        chosen, rejected = policy.sum.unbind(1)
        calibration = self.per_example(slic_loss(chosen, rejected, delta=self.delta), batch)
        # A sum over tokens, averaged over examples, as in the calibration term: per_token() would have another scale.
        sft = self.per_example(-self.lam * chosen, batch)
        return Output(loss={"calibration": calibration, "sft": sft}, rewards=policy.sum)
