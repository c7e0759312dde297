"""IPO: Identity Preference Optimisation (Azar et al. 2023, arXiv 2310.12036)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from halos.config.parameters import require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Objective, Output


def ipo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """The IPO loss of each pair (equation 17 of the paper): (h − 1/(2β))², with h = r_w − r_l.

    r = log π_θ(y|x) − log π_ref(y|x), of the chosen (w) and the rejected (l) completion; :class:`IPO` takes the mean
    over the tokens of y.

    Args:
        chosen, rejected: log π_θ(y|x) − log π_ref(y|x), in nats, [B]. In the paper they are summed over tokens;
            :class:`IPO` passes means.
        beta: the paper's τ, the strength of the KL constraint. The target of the margin h is 1/(2β).

    Returns:
        Losses [B], to be averaged over pairs.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


class IPO(Objective):
    """IPO on pairs: a squared loss towards a finite margin, which does not overfit to deterministic preferences.

    Deviations from the paper:
        1. Log-ratios are means over a completion's tokens, not sums, as in TRL and HALOs: the target margin 1/(2β) then
           does not depend on length. The logged rewards are β times these means.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: the paper's τ, above 0.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = (
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "https://arxiv.org/abs/2310.12036",
    )

    def __init__(self, backbone: BackboneSource = None, *, beta: float = 0.1, **options: Unpack[LoopOptions]) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        # The mean divides by the mask's count. Counting non-zero log-ratios instead would miss tokens at the reference.
        log_ratios = policy.mean - reference.mean
        losses = ipo_loss(*log_ratios.unbind(1), beta=self.beta)
        return Output(loss={"ipo": self.per_example(losses, batch)}, rewards=self.beta * log_ratios)
