"""Chooses the next tokens of completions, each from a random number of its own."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Neighbouring tokens whose probabilities are first added up as one."""


def uniform_draws(prompts: int, tokens: int, *, seed: int) -> Tensor:
    """Draw the random numbers of :func:`halos.sampling.generate.sample`'s ``draws``, [prompts, tokens] in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(prompts, tokens, dtype=torch.float64, generator=generator)


class Choose(Protocol):
    """Returns the tokens [n] at a place of n completions, chosen from their logits [n, V]."""

    def __call__(self, logits: Tensor, completions: Tensor, place: int) -> Tensor: ...


class Choice:
    """Chooses tokens by their logits.

    Args:
        draws: a random number in [0, 1) for each completion and token, [completions, tokens].
        temperature: divides the logits; 0 takes the most probable token each time.
        top_p: the share of probability that tokens are drawn from.
    """

    def __init__(self, draws: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> None:
        from transformers import TopPLogitsWarper

        self.draws, self.temperature = draws, temperature
        self._cut = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, logits: Tensor, completions: Tensor, place: int) -> Tensor:
        """Return the tokens [n] at a place of n completions, chosen from their logits [n, V]."""
        logits = logits.float()
        if self.temperature == 0:
            return logits.argmax(-1)
        if self.temperature != 1:
            logits = logits / self.temperature
        if self._cut is not None:
            logits = self._cut(None, logits)
        return token_at(logits, self.draws[completions, place])


def token_at(logits: Tensor, draws: Tensor) -> Tensor:
    """Return the token at which the cumulative probability passes the draw, [n].

    Args:
        logits: [n, V].
        draws: in [0, 1), [n] in float64.
    """
    probabilities = logits.softmax(-1)
    if rest := -logits.shape[1] % BLOCK:
        probabilities = F.pad(probabilities, (0, rest))
    # Cumulative sums over the whole vocabulary in float64 would take longer than the rest of a small model's step.
    blocks = probabilities.unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    # Times the last sum, which rounding keeps from being 1.
    draws = draws[:, None] * sums[:, -1:]
    block = _first_above(sums, draws)
    before = F.pad(sums, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].double().cumsum(-1)
    return (block * BLOCK + _first_above(inside, draws - before))[:, 0]


def _first_above(cumulative: Tensor, draws: Tensor) -> Tensor:
    # Right of equal values: nothing impossible is drawn. Rounding can bring a draw up to the last sum: then the last
    # place that is possible.
    place = torch.searchsorted(cumulative, draws, right=True)
    return torch.minimum(place, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))
