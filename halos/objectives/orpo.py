"""ORPO: Monolithic Preference Optimization without Reference Model (Hong et al. 2024, arXiv 2403.07691)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.config.parameters import require_between
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output
from halos.objectives.sft import sft_loss


def orpo_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The odds-ratio loss of each pair (equation 7 of the paper): −log σ(log odds(y_w|x) − log odds(y_l|x)).

    odds = P / (1 − P), and log P(y|x) is the mean over the tokens of y. ORPO's whole loss is L_SFT + β L_OR (equation
    6, where β is called λ): L_OR is this term, and L_SFT the SFT loss of the chosen completion y_w.

    Args:
        chosen, rejected: log P(y|x), averaged over the completion's tokens, in nats, [B].

    Returns:
        Losses [B], to be averaged over pairs.
    """
    return -logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(logp: Tensor) -> Tensor:
    """log(P / (1 − P)), from log P in nats. It is finite for log P = 0 too."""
    # A mean log-prob can round to 0, where the odds are infinite, so P is limited to just below 1.
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


class ORPO(Objective):
    """ORPO on pairs, without a reference: loss = L_SFT + β L_OR, with L_SFT the SFT loss of the chosen completion.

    Deviations from the paper:
        1. L_SFT is the mean over the chosen tokens of the whole step, as for ``loss=sft``.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: the paper's λ, the weight of the odds-ratio term, 0 or more. The logged rewards are β times the mean
            log-probs of the tokens.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = ("ORPO: Monolithic Preference Optimization without Reference Model", "https://arxiv.org/abs/2403.07691")
    needs = Needs(reference=False)

    def __init__(self, backbone: BackboneSource = None, *, beta: float = 0.1, **options: Unpack[LoopOptions]) -> None:
        super().__init__(backbone, **options)
        self.beta = require_between("beta", beta, 0.0)

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        # No reference holds the policy back, so the SFT term alone keeps the chosen completion likely.
        sft = self.per_token(sft_loss(policy.tokens[:, 0]), batch)
        odds = self.per_example(self.beta * orpo_loss(*policy.mean.unbind(1)), batch)
        return Output(loss={"sft": sft, "odds": odds}, rewards=self.beta * policy.mean)
