"""Reference against policy: what each says to held-out prompts, by the true reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from halos.data.records.truth import TrueReward
from halos.data.rows.chat_tokens import ChatTokens
from halos.data.rows.token_rows import Control
from halos.sampling.generate import log_ratios, sample


@dataclass(frozen=True, slots=True)
class Samples:
    """Completions of one model, with their true rewards in [0, 1]."""

    completions: list[str]
    rewards: list[float]
    desirable: list[bool]

    @property
    def desirable_share(self) -> float:
        """The share that people would want."""
        return sum(self.desirable) / len(self.desirable)

    @property
    def mean_reward(self) -> float:
        """The mean true reward."""
        return sum(self.rewards) / len(self.rewards)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Samples of the reference and of the policy for the same prompts, and KL(π_θ ‖ π_ref) in nats per completion."""

    prompts: list[str]
    reference: Samples
    policy: Samples
    kl: float

    def summary(self) -> dict[str, float]:
        """The numbers that a run's summary keeps."""
        return {
            "reference_desirable": self.reference.desirable_share,
            "policy_desirable": self.policy.desirable_share,
            "reference_reward": self.reference.mean_reward,
            "policy_reward": self.policy.mean_reward,
            "kl": self.kl,
        }


def compare(
    policy: Any,
    reference: Any,
    tokens: ChatTokens,
    judge: TrueReward,
    *,
    size: int,
    max_new_tokens: int,
    seed: int,
    control: Control,
) -> Comparison:
    """Sample both models on ``size`` held-out prompts at temperature 1; the policy is conditioned on "desirable"."""
    prompts = judge.prompts(size)
    plain = [tokens.fit_prompt(tokens.prompt(prompt), "prompt")[0] for prompt in prompts]
    conditioned = [tokens.fit_prompt(tokens.prompt(prompt, control(True)), "prompt")[0] for prompt in prompts]
    options = {
        "end_of_turn": tokens.end_of_turn,
        "pad": tokens.tokenizer.pad_token_id,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    said = sample(policy, conditioned, **options)
    kl = log_ratios(policy, reference, conditioned, plain, said).mean().item()
    before = sample(reference, plain, **options)
    return Comparison(prompts, judged(prompts, before, tokens, judge), judged(prompts, said, tokens, judge), kl)


def judged(prompts: list[str], completions: list[list[int]], tokens: ChatTokens, judge: TrueReward) -> Samples:
    """Decode the completions' ids, and ask the judge about each."""
    texts = [tokens.tokenizer.decode(_content(ids, tokens.end_of_turn)) for ids in completions]
    pairs = list(zip(prompts, texts, strict=True))
    return Samples(texts, [judge.reward(*pair) for pair in pairs], [judge.desirable(*pair) for pair in pairs])


def _content(ids: list[int], end: int) -> list[int]:
    return ids[:-1] if ids and ids[-1] == end else ids
