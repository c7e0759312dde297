"""DPO: Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290)."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.config.parameters import require_between, require_fraction, require_positive
from halos.loop.policy_weights import PolicyWeights
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Objective, Output


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    target: Tensor | float = 0.0,
) -> Tensor:
    """The DPO loss of each pair (equation 7 of the paper): −log σ(β(r_w − r_l)), r = log π_θ(y|x) − log π_ref(y|x).

    w is the chosen completion and l the rejected one. With ε > 0 this is the loss of cDPO (Mitchell 2023):
    −(1 − ε) log σ(β(r_w − r_l)) − ε log σ(−β(r_w − r_l)).
    With a target Δ (ODPO, R-DPO), β(r_w − r_l) − Δ takes the place of β(r_w − r_l).

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: log π(y|x), summed over the completion's
            tokens, in nats, [B].
        beta: β, the strength of the KL constraint.
        label_smoothing: ε, the probability that a recorded preference is flipped.
        target: Δ, the margin that the rewards β r of a pair should have, [B] or a number.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    r_w = policy_chosen - reference_chosen
    r_l = policy_rejected - reference_rejected
    margin = beta * (r_w - r_l) - target
    # Not log(sigmoid(m)), which is −inf for margins below about −88 in float32.
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


class DPO(Objective):
    """DPO on pairs of a chosen and a rejected completion. No deviations from the paper.

    Variants change the log-prob of a completion, the margin that the rewards of a pair should have, or pairs' weights:

    - length-normalised DPO (section 5 of Lambert et al. 2024, arXiv 2411.15124): means over tokens in place of sums;
    - LD-DPO (Liu et al. 2024, arXiv 2409.06411): tokens beyond the length of the pair's shorter completion count α;
    - R-DPO (Park et al. 2024, arXiv 2403.19159): Δ = −α(|y_w| − |y_l|), so that a longer chosen completion needs less;
    - WPO (Zhou et al. 2024, arXiv 2406.11827): the loss of a pair is weighted by how probable its completions are under
      the policy (:class:`halos.loop.policy_weights.PolicyWeights`): pairs that the policy would not write count less;
    - ODPO (Amini et al. 2024, arXiv 2402.10571): Δ = κ m, where m is by how much people preferred the chosen one.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, the strength of the KL constraint, above 0.
        label_smoothing: ε in [0, 1/2). Above 0 the loss is cDPO's.
        length_normalised: divide log-probs by the number of tokens; β then has to be larger by about that number.
        tail_weight: the weight of tokens beyond the length of the pair's shorter completion, in [0, 1] (LD-DPO's α).
        length_penalty: α of R-DPO's Δ = −α(|y_w| − |y_l|), in units of reward per token, 0 or more.
        margin_weight: κ of ODPO's Δ = κ m, where m is the pair's margin in the data; 0 or more. Above 0 each pair
            needs a margin.
        policy_weights: weight each pair's loss by how probable its completions are under the policy (WPO).

    Raises:
        ValueError: naming the key of a value out of range.
    """

    view = "pairs"
    paper = (
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "https://arxiv.org/abs/2305.18290",
    )

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        length_normalised: bool = False,
        tail_weight: float = 1.0,
        length_penalty: float = 0.0,
        margin_weight: float = 0.0,
        policy_weights: bool = False,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.label_smoothing = require_between("label_smoothing", label_smoothing, 0.0, 0.5)
        self.length_normalised = length_normalised
        self.tail_weight = require_fraction("tail_weight", tail_weight)
        self.length_penalty = require_between("length_penalty", length_penalty, 0.0)
        self.margin_weight = require_between("margin_weight", margin_weight, 0.0)
        self.policy_weights = PolicyWeights() if policy_weights else None
        self.needs = replace(self.needs, margins=self.margin_weight > 0, log_collision=policy_weights)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        ours, theirs = self.log_probs(policy), self.log_probs(reference)
        target = self.target_margins(batch, self.margin_weight)
        if self.length_penalty:
            target = target - self.length_penalty * (policy.count[:, 0] - policy.count[:, 1])
        # Branch 0 of a pair is the chosen completion, branch 1 the rejected one.
        sides = (*ours.unbind(1), *theirs.unbind(1))
        losses = dpo_loss(*sides, beta=self.beta, label_smoothing=self.label_smoothing, target=target)
        if self.policy_weights is not None:
            losses = losses * self.policy_weights(policy).prod(1)
        return Output(loss={"dpo": self.per_example(losses, batch)}, rewards=self.beta * (ours - theirs))

    def log_probs(self, logprobs: LogProbs) -> Tensor:
        """Return log π(y|x) of each completion as the loss reads it, [B, 2]: by default the sum over tokens."""
        tokens = logprobs.tokens
        if self.tail_weight != 1:
            places = torch.arange(tokens.shape[-1], device=tokens.device)
            shared = logprobs.count.amin(1)[:, None, None]
            tokens = torch.where(places < shared, tokens, self.tail_weight * tokens)
        return tokens.sum(-1) / logprobs.count if self.length_normalised else tokens.sum(-1)
