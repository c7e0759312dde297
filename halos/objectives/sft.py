"""SFT: supervised fine-tuning on demonstrations."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from halos.checks import check_choice
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output


def sft_loss(policy: Tensor) -> Tensor:
    """The negative log-likelihood of each completion token: −log π_θ(y_t | x, y_<t).

    The loss is the mean over all scored tokens of the step.

    Args:
        policy: log π_θ(y_t | x, y_<t), in nats, [B, C].

    Returns:
        Losses [B, C], to be averaged over all scored tokens of the step.
    """
    return -policy


class SFT(Objective):
    """SFT on demonstrations: chosen completions, desirable completions, or completions without feedback.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        average: ``tokens``: the loss is the mean over all scored tokens of the step. ``completions``: it is the mean
            over the step's completions of each one's mean over tokens, as in IRPO (Pang et al. 2024, arXiv 2404.19733).

    Raises:
        ValueError: for another value of ``average``.
    """

    view = "demonstrations"
    needs = Needs(reference=False)

    def __init__(
        self, backbone: BackboneSource = None, *, average: str = "tokens", **options: Unpack[LoopOptions]
    ) -> None:
        super().__init__(backbone, **options)
        check_choice("loss.average", average, ("tokens", "completions"))
        self.average = average

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        if self.average == "completions":
            return Output(loss={"sft": self.per_example(sft_loss(policy.mean[:, 0]), batch)})
        # Over the tokens of the whole step: a mean of examples' means would favour the tokens of short completions.
        return Output(loss={"sft": self.per_token(sft_loss(policy.tokens[:, 0]), batch)})
