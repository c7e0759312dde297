"""SPPO: Self-Play Preference Optimization (Wu et al. 2024, arXiv 2405.00675)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from halos.config.parameters import require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output
from halos.transfer import as_like


def sppo_loss(log_ratios: Tensor, win_probabilities: Tensor, *, beta: float = 0.1) -> Tensor:
    """The SPPO loss of each completion (equation 4.7 of the paper, in algorithm 1): (r − (P − 1/2)/β)².

    r = log π_θ(y|x) − log π_ref(y|x), and P is the probability that people prefer y to a completion of the reference.
    The loss of a pair is the sum over its two completions. In the hard version the chosen one has P = 1 and the
    rejected one P = 0, so the targets of their log-ratios are 1/(2β) and −1/(2β).

    Args:
        log_ratios: r, summed over the completion's tokens, in nats, any shape.
        win_probabilities: P, in that shape.
        beta: β = 1/η, of the paper's step size η.

    Returns:
        Losses of completions, in that shape, to be added up over a pair and averaged over pairs.
    """
    return (log_ratios - (win_probabilities - 0.5) / beta) ** 2


class SPPO(Objective):
    """SPPO on pairs: a squared loss with a target for the log-ratio of each completion.

    Deviations from the paper:
        1. One round on the pairs of the data instead of rounds on the policy's own samples, which ``rounds.count`` runs
           with any loss.
        2. P is 1 or 0, as in TRL's ``sppo_hard``; with ``soft``, it comes from the data.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β = 1/η, above 0.
        soft: P of a completion is its score in the data, in [0, 1] for both sides of each pair, in place of 1 and 0.

    Raises:
        ValueError: naming the key of a value out of range. Data without these scores are refused before training.
    """

    view = "pairs"
    paper = ("Self-Play Preference Optimization for Language Model Alignment", "https://arxiv.org/abs/2405.00675")

    def __init__(
        self, backbone: BackboneSource = None, *, beta: float = 0.1, soft: bool = False, **options: Unpack[LoopOptions]
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.soft = soft
        # With soft scores, the direction depends on whether P is above 1/2, not on the side of the pair.
        self.needs = Needs(pair_scores=True, moves=(None, None)) if soft else Needs()

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        log_ratios = policy.sum - reference.sum
        losses = sppo_loss(log_ratios, self._win_probabilities(batch, log_ratios), beta=self.beta).sum(1)
        return Output(loss={"sppo": self.per_example(losses, batch)}, rewards=self.beta * log_ratios)

    def _win_probabilities(self, batch: Batch, log_ratios: Tensor) -> Tensor:
        if not self.soft:
            return as_like([1.0, 0.0], log_ratios)
        assert batch.scores_chosen is not None  # the view is pairs
        assert batch.scores_rejected is not None
        return torch.stack([batch.scores_chosen, batch.scores_rejected], 1).to(log_ratios)
