"""IPO: Identity Preference Optimisation (Azar et al. 2023, arXiv 2310.12036)."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

from torch import Tensor

from halos.config.parameters import require_between, require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Objective, Output


def ipo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, margin: Tensor | float = 0.0) -> Tensor:
    """The IPO loss of each pair (equation 17 of the paper): (h − 1/(2β))², with h = r_w − r_l.

    r = log π_θ(y|x) − log π_ref(y|x), of the chosen (w) and the rejected (l) completion; :class:`IPO` takes the mean
    over the tokens of y. With a margin κ m the target of h is (1/2 + κ m)/β. For a preference of probability p the
    target is (p − 1/2)/β, which κ m = p − 1 gives.

    Args:
        chosen, rejected: log π_θ(y|x) − log π_ref(y|x), in nats, [B]. In the paper they are summed over tokens;
            :class:`IPO` passes means.
        beta: the paper's τ, the strength of the KL constraint. The target of the margin h is 1/(2β).
        margin: κ m, the additional difference that the rewards β r should have, [B] or a number.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    return (chosen - rejected - (0.5 + margin) / beta) ** 2


class IPO(Objective):
    """IPO on pairs: a squared loss towards a finite margin, which does not overfit to deterministic preferences.

    Deviations from the paper:
        1. Log-ratios are means over a completion's tokens, not sums, as in TRL and HALOs: the target margin 1/(2β) then
           does not depend on length. The logged rewards are β times these means.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: the paper's τ, above 0.
        margin_weight: κ, 0 or more. Above 0 each pair of the data needs a margin m.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = (
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "https://arxiv.org/abs/2310.12036",
    )

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 0.1,
        margin_weight: float = 0.0,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.margin_weight = require_between("margin_weight", margin_weight, 0.0)
        self.needs = replace(self.needs, margins=self.margin_weight > 0)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        # The mean divides by the mask's count. Counting non-zero log-ratios instead would miss tokens at the reference.
        log_ratios = policy.mean - reference.mean
        margin = self.target_margins(batch, self.margin_weight)
        losses = ipo_loss(*log_ratios.unbind(1), beta=self.beta, margin=margin)
        return Output(loss={"ipo": self.per_example(losses, batch)}, rewards=self.beta * log_ratios)
