"""BCO: Binary Classifier Optimization (Jung et al. 2024, arXiv 2404.04656)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from halos.config.parameters import require_positive
from halos.data.batches.collate import Batch
from halos.metrics import Mean
from halos.objectives.base import BackboneSource, LoopOptions, Needs, Objective, Output
from halos.policy.logprobs.completions import LogProbs
from halos.processes.collectives import all_sum


def bco_loss(
    policy: Tensor, reference: Tensor, desirable: Tensor, delta: Tensor | float, *, beta: float = 0.1
) -> Tensor:
    """The BCO loss of each completion: −log σ(βr − δ) if desirable, −log σ(δ − βr) if not.

    r = log π_θ(y|x) − log π_ref(y|x): a binary classifier whose logit is the implied reward.

    Args:
        policy, reference: log π(y|x) summed over the completion's tokens, in nats, [B].
        desirable: whether y is desirable given x, bool [B].
        delta: δ, the reward shift, see :class:`RewardShift`; no gradient flows into it.
        beta: β.

    Returns:
        Losses [B], to be averaged over examples.
    """
    delta = delta.detach() if isinstance(delta, Tensor) else delta
    logits = beta * (policy - reference) - delta
    return -logsigmoid(torch.where(desirable, logits, -logits))


class RewardShift(nn.Module):
    """δ = (E[βr | desirable] + E[βr | undesirable]) / 2, from running means over all rewards seen so far.

    A side that was not seen yet counts as the other; before both δ is 0. The state is in checkpoints, at float32 or
    better whatever the model's precision.
    """

    means: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(2))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.long))

    @torch.no_grad()
    def update(self, rewards: Tensor, desirable: Tensor) -> None:
        """Take in the rewards βr [B] of this rank's micro-batch, together with those of the other ranks."""
        sides = torch.stack([~desirable, desirable]).to(rewards.dtype)
        totals, new = all_sum(torch.stack([sides @ rewards, sides.sum(1)]))
        good = totals.isfinite().all()  # of a step that will be skipped nothing is learnt
        totals, new = totals.where(good, 0), new.where(good, 0)
        self.counts += new.long()
        self.means += (totals - new * self.means) / self.counts.clamp(min=1)

    def delta(self) -> Tensor:
        """δ, a scalar."""
        seen = self.counts > 0
        return (self.means * seen).sum() / seen.sum().clamp(min=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A sum kept in bf16 would stop growing.
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved.float() if moved.dtype in (torch.bfloat16, torch.float16) else moved

        return super()._apply(keep, recurse)


class BCO(Objective):
    """BCO on single completions marked desirable or undesirable.

    Deviations from the paper:
        1. The optional correction for prompts that differ between the two sides (a density ratio by a classifier on
           prompt embeddings) is not there.
        2. The expectations in δ are running means over all training examples so far, on all ranks; validation uses δ as
           it stands.

    Args:
        beta: β.
    """

    view = "binary"
    paper = ("Binary Classifier Optimization for Large Language Model Alignment", "https://arxiv.org/abs/2404.04656")
    needs = Needs(whole_micro_step=True)

    def __init__(
        self, backbone: BackboneSource | None = None, *, beta: float = 0.1, **options: Unpack[LoopOptions]
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.shift = RewardShift()

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        y, ref_y = policy.sum[:, 0], reference.sum[:, 0]
        rewards = self.beta * (y - ref_y)
        if self.training and torch.is_grad_enabled():
            self.shift.update(rewards, batch.desirable)
        delta = self.shift.delta()
        losses = bco_loss(y, ref_y, batch.desirable, delta, beta=self.beta)
        return Output(
            loss={"bco": self.per_example(losses, batch)},
            rewards=rewards[:, None],
            metrics={"delta": Mean(delta, 1.0)},
        )
