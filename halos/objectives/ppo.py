"""Offline PPO (Schulman et al. 2017, arXiv 1707.06347; offline as in section 3 of 2402.01306)."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from halos.config.parameters import require_between, require_fraction, require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output
from halos.policy.heads import ValueHead
from halos.processes.collectives import all_sum
from halos.transfer import as_like


class PPOLosses(NamedTuple):
    """The three terms of the loss of each token, [B, C], to be weighted and averaged over the step's scored tokens."""

    policy: Tensor
    critic: Tensor
    kl_penalty: Tensor


def ppo_loss(
    policy: Tensor,
    reference: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    *,
    clip_range: float = 0.5,
    gamma: float = 1.0,
    lam: float = 0.95,
    weights: Tensor | None = None,
) -> PPOLosses:
    """The three terms of offline PPO, whose old policy is the reference: ρ_t = π_θ(y_t|·) / π_ref(y_t|·).

    The loss is policy + critic_coefficient · critic + β kl_penalty, averaged over all scored tokens of the step.

    policy: −min(A_t ρ_t, A_t clip(ρ_t, 1 − c, 1 + c)) (equation 7 of 1707.06347), A_t the whitened advantage;
    critic: ½ (V_t − R_t)², V_t the value head's output, R_t the advantage before whitening plus V_t;
    kl_penalty: ρ_t log ρ_t − ρ_t + 1, whose mean over tokens drawn from the reference is KL(π_θ ‖ π_ref).

    Args:
        policy, reference: log π(y_t | x, y_<t), in nats, [B, C].
        values: V_t, [B, C].
        scores: the reward of each completion, which its last token gets, [B].
        mask: true where there is a token, bool [B, C]; the tokens of a row come first, then padding.
        clip_range: c.
        gamma, lam: γ and λ of generalised advantage estimation.
        weights: how much each completion counts when advantages are whitened, [B]; None: all 1.

    Returns:
        The three terms, [B, C] each.
    """
    advantages = generalised_advantages(scores, values.detach(), mask, gamma=gamma, lam=lam)
    # Before whitening, and without gradient: the critic's target must not move with the critic.
    returns = advantages + values.detach()
    advantages = whiten(advantages, mask, weights)
    # Padding may have any value, and exp() of a large one would give NaN gradients although it is masked.
    log_ratios = torch.where(mask, policy - reference, 0.0)
    surrogate, critic = clipped_surrogate(log_ratios, advantages, clip_range), 0.5 * (values - returns) ** 2
    return PPOLosses(surrogate, critic, kl_penalty(log_ratios))


def clipped_surrogate(log_ratios: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """The clipped surrogate loss −min(A ρ, A clip(ρ, 1 − c, 1 + c)), from log ρ and A of shapes that broadcast."""
    ratios = log_ratios.exp()
    return -torch.minimum(advantages * ratios, advantages * ratios.clamp(1 - clip_range, 1 + clip_range))


def kl_penalty(log_ratios: Tensor) -> Tensor:
    """ρ log ρ − ρ + 1 of each token, whose mean over tokens drawn from the reference is KL(π_θ ‖ π_ref)."""
    ratios = log_ratios.exp()
    return ratios * log_ratios - ratios + 1


def generalised_advantages(scores: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t (Schulman et al. 2015, arXiv 1506.02438, equation 16).

    Args:
        scores: the reward r_t of each completion's last token, [B]; all other rewards are 0.
        values: V_t, [B, C]; V is 0 after the last token.
        mask: true where there is a token, bool [B, C].
        gamma, lam: γ, λ.

    Returns:
        Advantages [B, C].
    """
    # True for the last token of each row: the next one is padding or past the end.
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    rewards = scores[:, None] * last
    values = values * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rewards + gamma * following - values) * mask
    # A_t = δ_t + γλ A_{t+1}, from the end. After the last token all δ are 0, and so is A.
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(scores)
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages


def whiten(advantages: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Advantages [B, C], scaled to mean 0 and variance 1 over the tokens of ``mask`` on all ranks; 0 elsewhere.

    Equal advantages all become 0. All ranks call this together. The tokens of each row count by its weight [B].
    """
    counts = mask if weights is None else mask * weights[:, None]
    count, total = all_sum(torch.stack([counts.sum().to(advantages.dtype), (advantages * counts).sum()]))
    mean = total / count
    # The variance of centred values, as E[A²] − E[A]² would lose all digits for a small variance.
    centred = (advantages - mean) * mask
    deviation = (all_sum((centred**2 * counts).sum()) / count).sqrt()
    # Smaller deviations are rounding. Divided by them, equal advantages would look like strong preferences.
    noise = 1e-5 if advantages.dtype.itemsize <= 4 else 1e-12
    return torch.where(deviation > noise * mean.abs(), centred / (deviation + 1e-8), 0.0)


class PPO(Objective):
    """Offline PPO on scored completions, without sampling: loss = policy + critic_coefficient · critic + β kl_penalty.

    The reward of a completion is its score in the data, or +1 for desirable and −1 for undesirable completions. The
    weight of an example also applies to its tokens when advantages are whitened.

    Deviations from the papers:
        1. The old policy is always the reference, so the clip also bounds how far the policy can move from it.
        2. The KL penalty is part of the loss. The data stand in for samples of the reference, so it is the estimator
           for such samples; a plain mean of log-ratios would lower the probability of all data alike.
        3. The value head reads detached hidden states, and its gradient is clipped separately from the policy's.
        4. Advantages are whitened over the whole step on all ranks, so gradients cannot be accumulated. Validation
           whitens each of its batches, so its loss depends slightly on ``data.batch_size``.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: coefficient of the KL penalty, and scale of the logged rewards β r; 0 or more.
        clip_range: c in (0, 1), the clip of the ratio.
        gamma: γ, the discount of generalised advantage estimation, in [0, 1].
        lam: λ of generalised advantage estimation, in [0, 1].
        critic_coefficient: weight of the critic's term, 0 or more.
        critic_clip: gradient-norm limit of the value head, above 0.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "scored"
    paper = ("Proximal Policy Optimization Algorithms", "https://arxiv.org/abs/1707.06347")
    needs = Needs(hidden=True, whole_step=True)
    value_head: ValueHead

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 0.1,
        clip_range: float = 0.5,
        gamma: float = 1.0,
        lam: float = 0.95,
        critic_coefficient: float = 0.5,
        critic_clip: float = 1.0,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_between("beta", beta, 0.0)
        self.clip_range = require_between("clip_range", clip_range, 0.0, 1.0, open_low=True)
        self.gamma = require_fraction("gamma", gamma)
        self.lam = require_fraction("lam", lam)
        self.critic_coefficient = require_between("critic_coefficient", critic_coefficient, 0.0)
        self.own_clip = require_positive("critic_clip", critic_clip)

    def build(self, hidden_size: int) -> None:
        # Made here and not in the constructor, because only the backbone knows the width of the hidden states.
        self.value_head = ValueHead(hidden_size)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        assert policy.hidden is not None  # needs.hidden
        assert batch.scores is not None  # the view is scored
        tokens = policy.tokens[:, 0]
        values, scores = self.value_head(policy.hidden[:, 0]), as_like(batch.scores, tokens)
        terms = ppo_loss(
            tokens,
            reference.tokens[:, 0],
            values,
            scores,
            batch.mask[:, 0],
            clip_range=self.clip_range,
            gamma=self.gamma,
            lam=self.lam,
            weights=batch.weights,
        )
        critic = self.critic_coefficient * terms.critic
        weighted = {"policy": terms.policy, "critic": critic, "kl_penalty": self.beta * terms.kl_penalty}
        loss = {name: self.per_token(losses, batch) for name, losses in weighted.items()}
        return Output(loss, rewards=self.beta * (policy.sum - reference.sum))
