"""SFT: supervised fine-tuning on demonstrations."""

from __future__ import annotations

from torch import Tensor

from halos.objectives.base import Batch, LogProbs, Needs, Objective, Output


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
    """SFT on demonstrations: chosen completions, desirable completions, or completions without feedback."""

    view = "demonstrations"
    needs = Needs(reference=False)

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        # Over the tokens of the whole step: a mean of each example's mean would weigh short completions more.
        return Output(loss={"sft": self.per_token(sft_loss(policy.tokens[:, 0]), batch)})
