"""Compares the policy with its reference by the true reward of their samples for held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from halos.data.records.truth import TrueReward
from halos.data.rows.chat_tokens import ChatTokens
from halos.data.rows.token_rows import Control
from halos.sampling.generate import sample
from halos.sampling.scoring import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Samples:
    """Completions of one model and their true rewards.

    Attributes:
        completions: texts.
        rewards: the true reward of each, in [0, 1].
        desirable: whether each is desirable.
    """

    completions: list[str]
    rewards: list[float]
    desirable: list[bool]

    @property
    def desirable_share(self) -> float:
        """The share of desirable completions."""
        return sum(self.desirable) / len(self.desirable)

    @property
    def mean_reward(self) -> float:
        """The mean true reward."""
        return sum(self.rewards) / len(self.rewards)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Samples of the reference and of the policy for the same prompts.

    Attributes:
        prompts: texts of the prompts.
        reference: samples of the reference.
        policy: samples of the policy.
        kl: KL(π_θ ‖ π_ref) in nats per completion, estimated from the policy's samples.
    """

    prompts: list[str]
    reference: Samples
    policy: Samples
    kl: float

    def summary(self) -> dict[str, float]:
        """The numbers that go into ``summary.json``."""
        return {
            "reference_desirable": self.reference.desirable_share,
            "policy_desirable": self.policy.desirable_share,
            "reference_reward": self.reference.mean_reward,
            "policy_reward": self.policy.mean_reward,
            "kl": self.kl,
        }


def compare(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokens: ChatTokens,
    true_reward: TrueReward,
    *,
    size: int,
    max_new_tokens: int,
    seed: int,
    control: Control,
) -> Comparison:
    """Sample both models at temperature 1 and compute the true reward of their completions.

    Args:
        policy: the trained model; its prompts end with the control token for "desirable", where there is one.
        reference: the model to compare with; its prompts have no control token.
        tokens: turns prompts into token ids and completions into text.
        true_reward: the true reward, which also has the held-out prompts.
        size: the number of prompts.
        max_new_tokens: the maximum number of tokens in a completion.
        seed: the seed of both models' samples.
        control: see :data:`halos.data.rows.token_rows.Control`.
    """
    prompts = true_reward.prompts(size)
    # The reference has not been trained with the control token and would read it as noise.
    plain = [tokens.fitted_prompt(prompt) for prompt in prompts]
    conditioned = [tokens.fitted_prompt(prompt, control(True)) for prompt in prompts]
    draw = partial(sample, end_of_turn=tokens.end_of_turn, pad=tokens.pad, max_new_tokens=max_new_tokens, seed=seed)
    # Both models draw with the same seed, so equal models give equal samples. The KL is estimated from samples of the
    # policy, not of the reference: KL(π_θ ‖ π_ref) is an expectation under the policy.
    completions = draw(policy, conditioned)
    kl = float(score(policy, reference, conditioned, plain, completions).divergence.mean())
    before = judged(prompts, draw(reference, plain), tokens, true_reward)
    after = judged(prompts, completions, tokens, true_reward)
    return Comparison(prompts, before, after, kl)


def judged(
    prompts: Sequence[str], completions: Sequence[Sequence[int]], tokens: ChatTokens, true_reward: TrueReward
) -> Samples:
    """Decode completions and compute the true reward of each.

    Args:
        prompts: n texts.
        completions: the token ids of n completions.
        tokens: decodes the completions.
        true_reward: the true reward.
    """
    texts = [tokens.text(ids) for ids in completions]
    pairs = list(zip(prompts, texts, strict=True))
    rewards = [true_reward.reward(*pair) for pair in pairs]
    desirable = [true_reward.desirable(*pair) for pair in pairs]
    return Samples(texts, rewards, desirable)
