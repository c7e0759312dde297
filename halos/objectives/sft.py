"""SFT: supervised fine-tuning on demonstrations."""

from __future__ import annotations

from torch import Tensor

from halos.data.batches.collate import Batch
from halos.objectives.base import Needs, Objective, Output
from halos.policy.logprobs.completions import LogProbs


def sft_loss(policy: Tensor) -> Tensor:
    """−log π_θ(y_t | x, y_<t) of each completion token.

    Takes token log-probs [B, C] in nats, returns losses [B, C], to be averaged over all scored tokens of the step.
    """
    return -policy


class SFT(Objective):
    """Maximum likelihood of completions: preferred ones, desirable ones, or those without any feedback."""

    view = "demonstrations"
    needs = Needs(reference=False)

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        return Output(loss={"sft": self.per_token(sft_loss(policy.tokens[:, 0]), batch)})
