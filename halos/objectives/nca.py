"""NCA and InfoNCA: Noise Contrastive Alignment (Chen et al. 2024, arXiv 2402.05369), on pairs and on scored groups."""

from __future__ import annotations

from functools import partial
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.config.parameters import require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output
from halos.transfer import as_like, on_device

PAPER = ("Noise Contrastive Alignment of Language Models with Explicit Rewards", "https://arxiv.org/abs/2402.05369")


def nca_pair_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """The NCA loss of each pair: −log σ(β r_w) − ½ log σ(−β r_w) − ½ log σ(−β r_l).

    r = log π_θ(y|x) − log π_ref(y|x), of the chosen (w) and the rejected (l) completion. The terms in r_w are smallest
    at σ(β r_w) = 2/3: the loss raises the chosen completion's probability to a finite multiple, while DPO may lower it.

    Args:
        chosen, rejected: r, summed over the completion's tokens, in nats, [B].
        beta: β, the paper's α.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    w, l = beta * chosen, beta * rejected  # noqa: E741 (the paper's letters)
    return -logsigmoid(w) - (logsigmoid(-w) + logsigmoid(-l)) / 2


class NCAPair(Objective):
    """NCA on pairs: a classifier of each completion against noise from the reference. No deviations from the paper.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, the paper's α, above 0.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = PAPER

    def __init__(self, backbone: BackboneSource = None, *, beta: float = 0.1, **options: Unpack[LoopOptions]) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        log_ratios = policy.sum - reference.sum
        losses = nca_pair_loss(*log_ratios.unbind(1), beta=self.beta)
        return Output(loss={"nca_pair": self.per_example(losses, batch)}, rewards=self.beta * log_ratios)


def nca_loss(log_ratios: Tensor, targets: Tensor, *, beta: float = 0.1) -> Tensor:
    """The NCA loss of each of K completions of a prompt: −K p log σ(β r) − log σ(−β r).

    r = log π_θ(y|x) − log π_ref(y|x). p = softmax(s/α) over the K, where s is a completion's score. The mean over the K
    is the paper's loss of the prompt; for two completions with p = (1, 0) it is the loss of a pair
    (:func:`nca_pair_loss`).

    Args:
        log_ratios: r, summed over the completion's tokens, in nats, [B].
        targets: K p (:func:`group_shares`), [B].
        beta: β, the scale of the implied reward.

    Returns:
        Losses [B], to be averaged over completions.
    """
    return -targets * logsigmoid(beta * log_ratios) - logsigmoid(-beta * log_ratios)


def infonca_loss(log_ratios: Tensor, targets: Tensor, groups: Tensor, weights: Tensor, *, beta: float = 0.1) -> Tensor:
    """The InfoNCA loss of each of K completions of a prompt: −K p log q, q = softmax(β r) over the K.

    The mean over the K is the paper's loss of the prompt, the cross-entropy −Σ p log q; for two completions with
    p = (1, 0) it is DPO's loss of the pair. For r and p see :func:`nca_loss`.

    Args:
        log_ratios: r, summed over the completion's tokens, in nats, [N].
        targets: K p (:func:`group_shares`), [N].
        groups: a number that completions of one prompt share, [N].
        weights: how much each completion counts, [N].
        beta: β, the scale of the implied reward.

    Returns:
        Losses [N], to be averaged over completions by weight.
    """
    return -targets * group_log_shares(beta * log_ratios, groups, weights)


def group_shares(
    scores: Tensor, groups: Tensor, step_scores: Tensor, step_groups: Tensor, step_weights: Tensor | None = None
) -> Tensor:
    """K p: the softmax of each completion's score over its group in the optimizer step, times the size of the group.

    Args:
        scores, groups: score over α, and group number, of each completion of the micro-batch, [B].
        step_scores, step_groups: the same for all N completions of the optimizer step, [N].
        step_weights: how much each of these counts, [N]; None: all 1.

    Returns:
        K p [B]; 1 for a completion that is alone.
    """
    weights = torch.ones_like(step_scores) if step_weights is None else step_weights
    size = ((groups[:, None] == step_groups[None]) * weights).sum(1)
    return size * _log_shares(scores, groups, step_scores, step_groups, weights).exp()


def group_log_shares(values: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """The log-softmax of each value over those of its group, where one of weight 2 counts as two; all are [N]."""
    return _log_shares(values, groups, values, groups, weights)


def _log_shares(values: Tensor, groups: Tensor, of_all: Tensor, all_groups: Tensor, weights: Tensor) -> Tensor:
    same = groups[:, None] == all_groups[None]
    return values - torch.where(same, of_all + weights.log(), float("-inf")).logsumexp(1)


class _Groups(Objective):
    view = "scored"
    paper = PAPER

    def __init__(
        self, backbone: BackboneSource = None, *, beta: float = 0.1, alpha: float = 1.0, **options: Unpack[LoopOptions]
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.alpha = require_positive("alpha", alpha)

    def targets(self, batch: Batch, like: Tensor) -> Tensor:
        """Return K p of the micro-batch's completions, [B]."""
        assert batch.scores is not None  # the view is scored
        scores, step_scores = (as_like(values, like) / self.alpha for values in (batch.scores, batch.step.scores))
        step_groups = on_device(batch.step.groups, device=like.device)
        weights = as_like(batch.step.weights, like) if batch.step.weights else None
        return group_shares(scores, batch.group, step_scores, step_groups, weights)


class NCA(_Groups):
    """NCA on several scored completions of each prompt: each is classified by itself against noise from the reference.

    The score is that of the data, or +1 for desirable and −1 for undesirable completions. Training shuffles whole
    prompts, so that all completions of a prompt are in one step. The weight of an example also applies to its score in
    p.

    Deviations from the paper:
        1. The mean is over completions, so a prompt counts by the number of its completions.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        alpha: α, the temperature of the scores, in their unit, above 0.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    needs = Needs(grouped=True)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        log_ratios = (policy.sum - reference.sum)[:, 0]
        losses = nca_loss(log_ratios, self.targets(batch, log_ratios), beta=self.beta)
        return Output({"nca": self.per_example(losses, batch)}, self.beta * log_ratios[:, None])


class InfoNCA(_Groups):
    """InfoNCA on several scored completions of each prompt: DPO for more than two completions, with scores.

    For scores, groups and weights see :class:`NCA`. The completions of a prompt are compared with each other across
    ranks, so a step cannot be divided into micro-batches.

    Deviations from the paper:
        1. The mean is over completions, so a prompt counts by the number of its completions.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        alpha: α, the temperature of the scores, in their unit, above 0.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    needs = Needs(grouped=True, whole_step=True)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        log_ratios = (policy.sum - reference.sum)[:, 0]
        columns = log_ratios, self.targets(batch, log_ratios), batch.group
        mean = self.per_coupled_example(partial(infonca_loss, beta=self.beta), columns, batch)
        return Output({"infonca": mean}, self.beta * log_ratios[:, None])
