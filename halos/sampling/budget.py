"""Decides how many validations of a run sample replies, by an estimate of their cost before the run.

The unit of cost is the forward pass of one token. Training costs three for each token (the backward pass counts two). A
sampled validation reads the prompts, decodes the replies, and scores prompts and replies by policy and reference. A
step of decoding reads all weights for a few tokens, which takes as long as a forward pass of :data:`DECODING` more
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHARE = 0.1
"""The share of training's computation that all sampled validations together may take."""
DECODING = 32
PASSES = 3


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """Which validations sample replies.

    Attributes:
        steps: the optimizer steps after which sampled validations take place.
        validations: the number of all validations, sampled or not.
        prompts: the number of prompts of each sampled validation.
        kl: whether they measure the KL.
        share: their computation as a share of training's.
    """

    steps: tuple[int, ...]
    validations: int
    prompts: int
    kl: bool
    share: float


def validation_cost(prompts: Sequence[int], lengths: Sequence[int], *, kl: bool) -> float:
    """Return the cost of a sampled validation.

    Args:
        prompts: tokens of each prompt.
        lengths: tokens of the data's completions; replies are assumed to have the same lengths.
        kl: whether policy and reference score the replies.
    """
    replies = len(prompts) * sum(lengths) / len(lengths)
    read = sum(prompts) + replies
    return read + DECODING * max(lengths) + (2 * read if kl else 0)


def sampling_plan(
    validations: Sequence[int], number: int | str, *, cost: float, trained_tokens: int, prompts: int, kl: bool
) -> SamplingPlan:
    """Choose the validations that sample replies, evenly spread, the last one among them.

    Args:
        validations: the optimizer steps of all validations. Empty if nothing is held out: then only the end samples.
        number: how many of them sample; ``auto``: as many as :data:`SHARE` allows, and at least one.
        cost: the cost of one (:func:`validation_cost`).
        trained_tokens: the tokens that training reads.
        prompts, kl: see :class:`SamplingPlan`.
    """
    training = PASSES * trained_tokens
    if not validations:
        return SamplingPlan((), 0, prompts, kl, cost / training)
    count = max(1, int(SHARE * training / cost)) if isinstance(number, str) else number
    count = min(count, len(validations))
    last = len(validations) - 1
    places = [last] if count == 1 else [round(last * n / (count - 1)) for n in range(count)]
    steps = tuple(validations[place] for place in places)
    return SamplingPlan(steps, len(validations), prompts, kl, count * cost / training)
