"""GRPO: Group Relative Policy Optimization (Shao et al. 2024, arXiv 2402.03300), offline on scored groups."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from halos.config.parameters import require_between
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Mean, Needs, Objective, Output
from halos.objectives.ppo import clipped_surrogate, kl_penalty
from halos.transfer import as_like, on_device


def grpo_loss(
    log_ratios: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float = 0.5
) -> tuple[Tensor, Tensor]:
    """The two terms of each completion (equation 3 of the paper), averaged over its tokens.

    The loss is policy + β kl_penalty, averaged over completions. ρ_t = π_θ(y_t|·) / π_ref(y_t|·), and A is the
    advantage of the completion: its score, less the mean of its group's scores, divided by their standard deviation.

    policy: −min(A ρ_t, A clip(ρ_t, 1 − c, 1 + c));
    kl_penalty: ρ_t log ρ_t − ρ_t + 1, whose mean over tokens drawn from the reference is KL(π_θ ‖ π_ref).

    Args:
        log_ratios: log ρ_t = log π_θ(y_t|·) − log π_ref(y_t|·), in nats, [B, C].
        advantages: A of each completion (:func:`group_advantages`), [B].
        mask: true where there is a token, bool [B, C].
        clip_range: c.

    Returns:
        (policy term [B], KL penalty [B]), to be averaged over completions and weighted.
    """
    # Padding may have any value, and exp() of a large one would give NaN gradients although it is masked.
    log_ratios = torch.where(mask, log_ratios, 0.0)
    surrogate = clipped_surrogate(log_ratios, advantages[:, None], clip_range)
    count = mask.sum(1)
    return (surrogate * mask).sum(1) / count, (kl_penalty(log_ratios) * mask).sum(1) / count


def group_advantages(
    scores: Tensor, groups: Tensor, step_scores: Tensor, step_groups: Tensor, step_weights: Tensor | None = None
) -> Tensor:
    """Group-relative advantages: A_i = (s_i − mean(s)) / std(s) over i's group (section 4.1.2 of the paper).

    Args:
        scores, groups: score and group number of each completion of the micro-batch, [B].
        step_scores, step_groups: the same for all N completions of the optimizer step, over which mean and (population)
            standard deviation are taken, [N].
        step_weights: how much each of these counts in mean and deviation, [N]; None: all 1.

    Returns:
        Advantages [B]; 0 in a group of one completion or of equal scores.
    """
    # [B, N]: a product with it sums over each completion's group.
    same = (groups[:, None] == step_groups[None]).to(step_scores.dtype)
    if step_weights is not None:
        same = same * step_weights
    count = same.sum(1)
    mean = same @ step_scores / count
    deviation = ((same * (step_scores - mean[:, None]) ** 2).sum(1) / count).sqrt()
    # Smaller deviations are rounding. Divided by them, equal scores would look like strong preferences.
    return torch.where(deviation > 1e-6 * (1 + mean.abs()), (scores - mean) / deviation, 0.0)


class GRPO(Objective):
    """Offline GRPO on scored completions, with the other completions of a prompt as baseline: policy + β kl_penalty.

    The score is that of the data, or +1 for desirable and −1 for undesirable completions. Training shuffles whole
    prompts, so that all completions of a prompt are in one step. The logged metric ``groups/incomplete`` is the share
    of completions whose group is split between two steps, or whose prompt has no other completion. The weight of an
    example also applies to its score in the mean and the deviation of its group.

    Deviations from the paper:
        1. The completions come from the data, and the old policy is always the reference, as for offline PPO. The data
           stand in for samples of the reference, so the KL penalty is the estimator for such samples; the paper's is
           for samples of the policy.
        2. The standard deviation is the group's population deviation, with nothing added to it (TRL: the sample
           deviation plus 1e-4).

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: coefficient of the KL penalty, and scale of the logged rewards β r; 0 or more.
        clip_range: c in (0, 1). The default is wider than PPO's usual 0.2, because it bounds the change over the whole
            run.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "scored"
    paper = (
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "https://arxiv.org/abs/2402.03300",
    )
    needs = Needs(grouped=True)

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 0.04,
        clip_range: float = 0.5,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_between("beta", beta, 0.0)
        self.clip_range = require_between("clip_range", clip_range, 0.0, 1.0, open_low=True)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        assert batch.scores is not None  # the view is scored
        log_ratios = (policy.tokens - reference.tokens)[:, 0]
        step_groups = on_device(batch.step.groups, device=log_ratios.device)
        # The baseline is over the whole step, because this rank's micro-batch may contain only a part of a group.
        scores, step_scores = (as_like(values, log_ratios) for values in (batch.scores, batch.step.scores))
        step_weights = as_like(batch.step.weights, log_ratios) if batch.step.weights else None
        advantages = group_advantages(scores, batch.group, step_scores, step_groups, step_weights)
        surrogate, penalty = grpo_loss(log_ratios, advantages, batch.mask[:, 0], clip_range=self.clip_range)
        terms = {"policy": surrogate, "kl_penalty": self.beta * penalty}
        loss = {name: self.per_example(losses, batch) for name, losses in terms.items()}
        rewards = self.beta * (policy.sum - reference.sum)[:, :1]
        return Output(loss, rewards, {"groups/incomplete": self._incomplete(batch, step_groups)})

    def _incomplete(self, batch: Batch, step_groups: Tensor) -> Mean:
        # The baseline of an incomplete group is computed from the completions in the step only.
        same = batch.group[:, None] == step_groups[None]
        in_step = same.sum(1)
        members = on_device(batch.step.members, device=in_step.device)
        # A step of a mixture may have no scored completion, and then no maximum.
        in_data = (same * members).amax(1) if batch.step.members else in_step
        return self.per_example(((in_step < in_data) | (in_step < 2)).float(), batch)
