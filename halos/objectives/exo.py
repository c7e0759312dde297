"""EXO: Efficient Exact Optimization (Ji et al. 2024, arXiv 2402.00856), on pairs and on scored groups."""

from __future__ import annotations

import math
from functools import partial
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.config.parameters import require_between, require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output
from halos.objectives.nca import group_log_shares
from halos.transfer import as_like

PAPER = ("Towards Efficient Exact Optimization of Language Model Alignment", "https://arxiv.org/abs/2402.00856")


def exo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.001) -> Tensor:
    """The EXO-pref loss of each pair (equation 16 of the paper): KL(q ‖ p) of two distributions over its completions.

    q = (σ(m), σ(−m)) is the policy's preference, with m = β(r_w − r_l) and r = log π_θ(y|x) − log π_ref(y|x).
    p = (1 − ε, ε) is the preference of the data. DPO minimises KL(p ‖ q) with ε = 0.

    Args:
        chosen, rejected: r of the chosen (w) and the rejected (l) completion, summed over tokens, in nats, [B].
        beta: β, the paper's β_π; the loss is smallest where the margin m is log((1 − ε)/ε).
        label_smoothing: ε, the probability of the rejected completion under p, above 0.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    margin = beta * (chosen - rejected)
    log_chosen, log_rejected = math.log1p(-label_smoothing), math.log(label_smoothing)
    return torch.sigmoid(margin) * (logsigmoid(margin) - log_chosen) + torch.sigmoid(-margin) * (
        logsigmoid(-margin) - log_rejected
    )


class EXO(Objective):
    """EXO on pairs: the reverse KL(q ‖ p) in place of DPO's KL(p ‖ q). No deviations from the paper.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, the paper's β_π, above 0.
        label_smoothing: ε in (0, 1/2).

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = PAPER

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.001,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.label_smoothing = require_between("label_smoothing", label_smoothing, 0.0, 0.5, open_low=True)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        log_ratios = policy.sum - reference.sum
        losses = exo_loss(*log_ratios.unbind(1), beta=self.beta, label_smoothing=self.label_smoothing)
        return Output(loss={"exo": self.per_example(losses, batch)}, rewards=self.beta * log_ratios)


def exo_rw_loss(
    log_ratios: Tensor, scores: Tensor, groups: Tensor, weights: Tensor, *, beta: float = 0.1, alpha: float = 1.0
) -> Tensor:
    """The EXO-rw loss of each of K completions of a prompt: K q log(q/p), q = softmax(β r), p = softmax(s/α).

    r = log π_θ(y|x) − log π_ref(y|x), and s is the score. The mean over the K is KL(q ‖ p), the paper's loss of the
    prompt (section 3.2); InfoNCA's is the cross-entropy −Σ p log q. For two completions with the
    scores log(1 − ε) and log ε, and α = 1, it is the loss of a pair (:func:`exo_loss`).

    Args:
        log_ratios: r, summed over the completion's tokens, in nats, [N].
        scores: s, in their own unit, [N].
        groups: a number that completions of one prompt share, [N].
        weights: how much each completion counts, [N].
        beta: β, the paper's β_π.
        alpha: α, the paper's β_r; the losses are smallest where β r is s/α plus a constant of the prompt.

    Returns:
        Losses [N], to be averaged over completions by weight.
    """
    log_q, log_p = (group_log_shares(values, groups, weights) for values in (beta * log_ratios, scores / alpha))
    size = ((groups[:, None] == groups[None]) * weights).sum(1)
    return size * log_q.exp() * (log_q - log_p)


class EXORewards(Objective):
    """EXO-rw on several scored completions of each prompt: fits the policy's shares among them to those of the scores.

    The score is that of the data, or +1 for desirable and −1 for undesirable completions. Training shuffles whole
    prompts, so that all completions of a prompt are in one step. They are compared with each other across ranks, so a
    step cannot be divided into micro-batches. The weight of an example also applies to its shares.

    Deviations from the paper:
        1. The completions come from the data; the paper draws K samples from the reference.
        2. The mean is over completions, so a prompt counts by the number of its completions.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, the paper's β_π, above 0.
        alpha: α, the paper's β_r: the temperature of the scores, in their unit, above 0.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "scored"
    paper = PAPER
    needs = Needs(grouped=True, whole_step=True)

    def __init__(
        self, backbone: BackboneSource = None, *, beta: float = 0.1, alpha: float = 1.0, **options: Unpack[LoopOptions]
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.alpha = require_positive("alpha", alpha)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        assert batch.scores is not None  # the view is scored
        log_ratios = (policy.sum - reference.sum)[:, 0]
        loss = partial(exo_rw_loss, beta=self.beta, alpha=self.alpha)
        mean = self.per_coupled_example(loss, (log_ratios, as_like(batch.scores, log_ratios), batch.group), batch)
        return Output({"exo_rw": mean}, self.beta * log_ratios[:, None])
