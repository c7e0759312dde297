"""BCO: Binary Classifier Optimization (Jung et al. 2024, arXiv 2404.04656)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.checks import check_choice
from halos.config.parameters import require_positive
from halos.loop.reference_point import REFERENCE_POINTS, ReferencePoint, reference_point as make_reference_point
from halos.loop.state import RunningState
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Mean, Needs, Objective, Output
from halos.processes.collectives import all_sum
from halos.transfer import on_device

MIDPOINT = "midpoint"
"""The paper's reward shift, among the values of ``loss.reference_point``."""


def bco_loss(
    policy: Tensor, reference: Tensor, desirable: Tensor, delta: Tensor | float, *, beta: float = 0.1
) -> Tensor:
    """The BCO loss of each completion: −log σ(βr − δ) for desirable y, −log σ(δ − βr) for undesirable y.

    r = log π_θ(y|x) − log π_ref(y|x), and δ is halfway between the mean rewards βr of desirable and undesirable y. This
    is the cross-entropy of a binary classifier whose logit is the implied reward βr, shifted by δ.

    Args:
        policy, reference: log π(y|x), summed over the completion's tokens, in nats, [B].
        desirable: whether y is desirable given x, bool [B].
        delta: δ, the reward shift (:class:`RewardShift`), a scalar or [B]. No gradient flows into it.
        beta: β, the strength of the KL constraint.

    Returns:
        Losses [B], to be averaged over examples.
    """
    delta = delta.detach() if isinstance(delta, Tensor) else delta
    # The targets of undesirable completions are 0: log(1 − σ(x)) is log σ(−x), which does not overflow.
    logits = beta * (policy - reference) - delta
    return -logsigmoid(torch.where(desirable, logits, -logits))


class RewardShift(RunningState):
    """The reward shift δ = (E[βr | desirable] + E[βr | undesirable]) / 2, from running means over all rewards so far.

    Before the first reward of one kind, δ is the mean of the other kind, and 0 before any reward. The running means are
    saved in checkpoints, in float32 or better whatever the model's precision.

    Attributes:
        means: means of the rewards, (undesirable, desirable), [2].
        counts: the sum of the weights in each mean, [2].
    """

    means: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Buffers, not attributes: a resumed run must continue with the means that it had.
        self.register_buffer("means", torch.zeros(2))
        self.register_buffer("counts", torch.zeros(2))

    @torch.no_grad()
    def update(self, rewards: Tensor, desirable: Tensor, weights: Tensor | None = None) -> None:
        """Add the rewards of all ranks' micro-batches. All ranks call this together, each with its own rewards βr [B].

        Args:
            rewards: the rewards.
            desirable: whether each belongs to a desirable completion, bool [B].
            weights: how much each counts, [B]; None: all 1.
        """
        sides = torch.stack([~desirable, desirable]).to(rewards.dtype)
        if weights is not None:
            sides *= weights
        totals, new = all_sum(torch.stack([sides @ rewards, sides.sum(1)]))
        # A step with a non-finite loss is skipped, and must not spoil the means for ever.
        finite = totals.isfinite().all()
        totals, new = totals.where(finite, 0), new.where(finite, 0)
        # The running mean after n more rewards: m + (their sum − n m) / count.
        self.counts += new
        self.means += (totals - new * self.means) / self.counts.where(self.counts > 0, 1)

    def delta(self) -> Tensor:
        """δ, a scalar."""
        seen = self.counts > 0
        return (self.means * seen).sum() / seen.sum().clamp(min=1)


class BCO(Objective):
    """BCO on single completions labelled desirable or undesirable.

    The logged metric ``delta`` is δ, in units of the reward.

    Deviations from the paper:
        1. The optional correction for prompts that differ between the two sides (a density ratio, estimated by a
           classifier on prompt embeddings) is not implemented.
        2. The expectations in δ are running means over all training examples so far, on all ranks. Validation uses the
           current δ.

    The paper's δ is not an estimate of a KL divergence, but the threshold halfway between the mean rewards of the two
    sides, chosen to tighten a bound on DPO's loss. With an estimator of KTO's z₀ as ``reference_point``, δ = β z₀: the
    classifier compares a completion with how far the policy has moved as a whole, as KTO does.

    The weight of an example also applies to its reward in δ.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        reference_point: ``midpoint`` between the mean rewards as in the paper, or an estimator of KTO's z₀:
            ``mismatched``, ``zero``, ``running``, ``per_prompt``, ``token`` or ``policy``; see
            :mod:`halos.loop.reference_point`.
        reference_point_steps: see :class:`halos.objectives.KTO`.
        clamp_reference_point: take the maximum of z₀ and 0. The midpoint is never clamped.

    Raises:
        ValueError: a value is out of range (the error names its key), or a combination of values has no meaning.
    """

    view = "binary"
    paper = ("Binary Classifier Optimization for Large Language Model Alignment", "https://arxiv.org/abs/2404.04656")
    needs = Needs(whole_micro_step=True)

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 0.1,
        reference_point: str = MIDPOINT,
        reference_point_steps: int | None = None,
        clamp_reference_point: bool = True,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        check_choice("loss.reference_point", reference_point, (MIDPOINT, *REFERENCE_POINTS))
        # One of the two is None: otherwise every checkpoint would have state that nothing reads.
        self.shift = RewardShift() if reference_point == MIDPOINT else None
        self.reference_point: ReferencePoint | None = None
        if self.shift is None:
            point = make_reference_point(reference_point, clamp=clamp_reference_point, steps=reference_point_steps)
            self.reference_point, self.needs = point, Needs() | point.needs
        elif reference_point_steps is not None:
            expected = f"expected null with loss.reference_point={MIDPOINT}, found {reference_point_steps}"
            raise ValueError(f"loss.reference_point_steps: {expected}; it is a mean over all steps")

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        assert batch.desirable is not None  # the view is binary
        y, ref_y = policy.sum[:, 0], reference.sum[:, 0]
        rewards = self.beta * (y - ref_y)
        metrics: dict[str, Mean] = {}
        if self.shift is not None:
            # Without gradient this is a second call for the same batch (humanline's unclamped rewards), which must not
            # count.
            if self.training and torch.is_grad_enabled():
                self.shift.update(rewards, batch.desirable, batch.weights)
            delta = self.shift.delta()
            metrics = {"delta": Mean(delta, 1.0)}
        else:
            assert self.reference_point is not None
            z0, metrics = self.reference_point(batch, policy, reference.sum)
            delta = self.beta * z0
        losses = bco_loss(y, ref_y, batch.desirable, delta, beta=self.beta)
        return Output({"bco": self.per_example(losses, batch)}, rewards[:, None], metrics)

    def end_step(self) -> None:
        if self.reference_point is not None:
            self.reference_point.end_step()


def bco_pair_loss(chosen: Tensor, rejected: Tensor, delta: Tensor | float, *, beta: float = 0.1) -> Tensor:
    """The BCO loss of each pair: −log σ(β r_w − δ) − log σ(δ − β r_l), the sum of BCO's losses of its completions.

    Args:
        chosen, rejected: r = log π_θ(y|x) − log π_ref(y|x) of both completions, summed over tokens, in nats, [B].
        delta: δ, the reward shift (:class:`RewardShift`), a scalar. No gradient flows into it.
        beta: β, the strength of the KL constraint.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    delta = delta.detach() if isinstance(delta, Tensor) else delta
    return -logsigmoid(beta * chosen - delta) - logsigmoid(delta - beta * rejected)


class BCOPair(Objective):
    """BCO on pairs, for use in mixtures: both completions of a pair are in one step and share prompt and forward pass.

    Deviations from the paper:
        1. Those of :class:`BCO`. The loss of a pair is the sum of its completions' losses.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        reward_shift: δ: ``midpoint`` of the mean rewards of both sides as in the paper, or ``zero`` (TRL's bco_pair).

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = BCO.paper

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 0.1,
        reward_shift: str = MIDPOINT,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        check_choice("loss.reward_shift", reward_shift, (MIDPOINT, "zero"))
        self.shift = RewardShift() if reward_shift == MIDPOINT else None
        self.needs = Needs(whole_micro_step=self.shift is not None)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        log_ratios = policy.sum - reference.sum
        rewards, delta = self.beta * log_ratios, log_ratios.new_zeros(())
        if self.shift is not None:
            if self.training and torch.is_grad_enabled():  # see BCO.compute
                desirable = on_device([True, False], device=rewards.device).expand_as(rewards)
                weights = None if batch.weights is None else batch.weights[:, None].expand_as(rewards).flatten()
                self.shift.update(rewards.flatten(), desirable.flatten(), weights)
            delta = self.shift.delta()
        losses = bco_pair_loss(log_ratios[:, 0], log_ratios[:, 1], delta, beta=self.beta)
        return Output({"bco_pair": self.per_example(losses, batch)}, rewards, {"delta": Mean(delta, 1.0)})
