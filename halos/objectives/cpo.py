"""CPO: Contrastive Preference Optimization (Xu et al. 2024, arXiv 2401.08417)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.config.parameters import require_between, require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output
from halos.objectives.sft import sft_loss


def cpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """L_prefer of each pair (equation 3 of the paper): −log σ(β log π_θ(y_w|x) − β log π_θ(y_l|x)).

    This is DPO's loss with a uniform reference. CPO's whole loss is L_prefer + α L_NLL (equation 5), where L_NLL is the
    SFT loss of the chosen completion y_w.

    Args:
        chosen, rejected: log π_θ(y|x), summed over the completion's tokens, in nats, [B].
        beta: β, the scale of the implied reward.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    return -logsigmoid(beta * (chosen - rejected))


class CPO(Objective):
    """CPO on pairs, without a reference: loss = L_prefer + α L_NLL, with L_NLL the SFT loss of the chosen completion.

    Deviations from the paper:
        1. L_NLL is the mean over the chosen tokens of the whole step (as in TRL), not a sum over each completion's
           tokens.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        alpha: α, the weight of the SFT term, 0 or more; 1 in the paper.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = (
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
        "https://arxiv.org/abs/2401.08417",
    )
    needs = Needs(reference=False)

    def __init__(
        self, backbone: BackboneSource = None, *, beta: float = 0.1, alpha: float = 1.0, **options: Unpack[LoopOptions]
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.alpha = require_between("alpha", alpha, 0.0)

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        # The terms have different denominators: the pairs and the chosen tokens of the step.
        prefer = self.per_example(cpo_loss(*policy.sum.unbind(1), beta=self.beta), batch)
        sft = self.per_token(self.alpha * sft_loss(policy.tokens[:, 0]), batch)
        return Output(loss={"prefer": prefer, "sft": sft}, rewards=self.beta * policy.sum)
