"""GRPO: Group Relative Policy Optimization (Shao et al. 2024, arXiv 2402.03300), offline on scored groups."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from halos.config.parameters import require_between
from halos.data.batches.collate import Batch
from halos.metrics import Mean
from halos.objectives.base import BackboneSource, LoopOptions, Needs, Objective, Output
from halos.objectives.ppo import clipped_surrogate, reference_kl
from halos.policy.logprobs.completions import LogProbs


def grpo_loss(
    log_ratios: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float = 0.5
) -> tuple[Tensor, Tensor]:
    """The two terms of each completion, equation 3 of the paper: means over its tokens of

    −min(A ρ_t, A clip(ρ_t, 1 − c, 1 + c)) and of the KL penalty ρ_t log ρ_t − ρ_t + 1.

    Args:
        log_ratios: log ρ_t = log π_θ(y_t|·) − log π_ref(y_t|·), in nats, [B, C].
        advantages: A of each completion, see :func:`group_advantages`, [B].
        mask: which tokens exist, bool [B, C].
        clip_range: c.

    Returns:
        (policy term [B], KL term [B]), to be averaged over completions and weighted.
    """
    log_ratios = torch.where(mask, log_ratios, 0.0)
    surrogate = clipped_surrogate(log_ratios, advantages[:, None], clip_range)
    count = mask.sum(1)
    return (surrogate * mask).sum(1) / count, (reference_kl(log_ratios) * mask).sum(1) / count


def group_advantages(scores: Tensor, groups: Tensor, step_scores: Tensor, step_groups: Tensor) -> Tensor:
    """A_i = (s_i − mean(s)) / std(s) over the completions of i's group in the step (section 4.1.2 of the paper).

    ``scores`` [B] and ``groups`` [B] are those of the completions asked for, ``step_scores`` [N] and ``step_groups``
    [N] those of the whole step. A group of one, or of equal scores, prefers nothing: 0.
    """
    same = (groups[:, None] == step_groups[None]).to(step_scores.dtype)
    count = same.sum(1)
    mean = same @ step_scores / count
    deviation = ((same * (step_scores - mean[:, None]) ** 2).sum(1) / count).sqrt()
    # Below this the differences are rounding, which must not be blown up to a preference.
    return torch.where(deviation > 1e-6 * (1 + mean.abs()), (scores - mean) / deviation, 0.0)


class GRPO(Objective):
    """Offline GRPO: the other completions of a prompt are the baseline; loss = policy + beta · kl.

    The reward is the record's score, or +1 for desirable and −1 for undesirable completions. Training shuffles whole
    prompts, so that their completions meet in one step; ``groups/incomplete`` is the share of completions whose group
    a step's edge has cut, or that are alone with their prompt.

    Deviations from the paper:
        1. The completions are those of the data and the old policy is the reference throughout, as for offline PPO;
           the KL penalty is exact on the reference's samples (the data stand for those), where the paper's estimator
           needs the policy's.
        2. The deviation is that of the group as a population, and nothing is added to it (TRL: an unbiased one, plus
           1e-4).

    Args:
        beta: coefficient of the KL penalty, and the scale of the logged rewards β · log-ratio.
        clip_range: c in (0, 1). Wider than online (0.2), because it bounds how far the policy moves in the whole run.
    """

    view = "scored"
    paper = (
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "https://arxiv.org/abs/2402.03300",
    )
    needs = Needs(grouped=True)

    def __init__(
        self,
        backbone: BackboneSource | None = None,
        *,
        beta: float = 0.04,
        clip_range: float = 0.5,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_between("beta", beta, 0.0)
        self.clip_range = require_between("clip_range", clip_range, 0.0, 1.0, open_low=True)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        log_ratios = (policy.tokens - reference.tokens)[:, 0]
        step_groups = torch.tensor(batch.step.groups, device=log_ratios.device)
        scores, step_scores = (
            torch.tensor(values, dtype=log_ratios.dtype, device=log_ratios.device)
            for values in (batch.scores, batch.step.scores)
        )
        advantages = group_advantages(scores, batch.group, step_scores, step_groups)
        surrogate, kl = grpo_loss(log_ratios, advantages, batch.mask[:, 0], clip_range=self.clip_range)
        return Output(
            loss={
                "policy": self.per_example(surrogate, batch),
                "kl": self.per_example(self.beta * kl, batch),
            },
            rewards=self.beta * (policy.sum - reference.sum)[:, :1],
            metrics={"groups/incomplete": self._incomplete(batch, step_groups)},
        )

    def _incomplete(self, batch: Batch, step_groups: Tensor) -> Mean:
        here = (batch.group[:, None] == step_groups[None]).sum(1)
        whole = dict(zip(batch.step.groups, batch.step.members, strict=True))
        members = torch.tensor([whole[group] for group in batch.group.tolist()], device=here.device)
        return Mean(((here < members) | (here < 2)).sum(), len(batch))
