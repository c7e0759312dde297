"""Exact scores of completions under a policy and its reference, token by token: log-probs, entropy, divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row, Span
from halos.policy.logprobs.token_statistics import expectation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = NDArray[np.float64]
Ids = Sequence[int]
Track = Callable[[Sequence[int]], Iterable[int]]
"""Iterates over the starts of batches, perhaps with a progress bar."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over the tokens of each completion, its end-of-turn token included, in nats, [n].

    On samples from π_θ, the mean of ``logps − reference`` and the mean of ``divergence`` are both unbiased estimates of
    KL(π_θ ‖ π_ref) over whole completions. The second has the lower variance: each token's log-ratio is replaced by its
    expectation over the vocabulary. On other completions ``divergence`` measures how far the two models are apart at
    the tokens of the data, and is no estimate of KL(π_θ ‖ π_ref).

    Attributes:
        logps: log π_θ(y|x).
        reference: log π_ref(y|x); NaN without a reference.
        entropy: Σ_t H(π_θ(·|x, y_<t)).
        divergence: Σ_t KL(π_θ(·|x, y_<t) ‖ π_ref(·|x, y_<t)), each over the whole vocabulary; NaN without a reference.
        tokens: the number of tokens.
    """

    logps: Array
    reference: Array
    entropy: Array
    divergence: Array
    tokens: Array

    @property
    def log_ratios(self) -> Array:
        """r_θ(x, y) = log π_θ(y|x) − log π_ref(y|x), [n]."""
        return self.logps - self.reference

    @property
    def has_reference(self) -> bool:
        """Whether there was a reference to compare with."""
        return not np.isnan(self.divergence).any()


@torch.no_grad()
def score(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    policy_prompts: Sequence[Ids],
    reference_prompts: Sequence[Ids],
    completions: Sequence[Ids],
    *,
    contexts: Sequence[Sequence[Span]] | None = None,
    batch_size: int = 32,
    track: Track = iter,
) -> Scores:
    """Score completions, each after its prompt.

    Args:
        policy: π_θ.
        reference: π_ref, if there is one.
        policy_prompts: the prompts' token ids as the policy reads them, [n]; CSFT's end with a control token.
        reference_prompts: the prompts' token ids as the reference reads them, [n].
        completions: the completions' token ids, [n].
        contexts: the spans of each completion that are not scored, [n]; None: every token is.
        batch_size: completions in one forward.
        track: iterates over the batches.

    Raises:
        ValueError: a completion is empty, or the vocabularies of the models differ in size.
    """
    if any(not ids for ids in completions):
        raise ValueError("completions: expected at least one token in each, found an empty one")
    # Each batch is reduced to sums at once: distributions over the vocabulary of all completions would not fit.
    batches: list[Tensor] = []
    for start in track(range(0, len(completions), batch_size)):
        batch = slice(start, start + batch_size)
        own = [() for _ in completions[batch]] if contexts is None else contexts[batch]
        rows = [
            Row("", n, (), (tuple(ids),), context=(tuple(spans),))
            for n, (ids, spans) in enumerate(zip(completions[batch], own, strict=True))
        ]
        ours = _distributions(policy, policy_prompts[batch], rows)
        theirs = None if reference is None else _distributions(reference, reference_prompts[batch], rows)
        batches.append(_sums(ours, theirs, [[row.branches[0][place] for place in row.scored(0)] for row in rows]))
    columns = torch.cat(batches, dim=1) if batches else torch.zeros(5, 0)
    return Scores(*columns.double().cpu().numpy())


def _distributions(model: PreTrainedModel, prompts: Sequence[Ids], completions: Sequence[Row]) -> Tensor:
    # log π(· | x, y_<t), [tokens, vocabulary], at all scored tokens, completion by completion.
    rows = [replace(row, prompt=tuple(prompt)) for prompt, row in zip(prompts, completions, strict=True)]
    (chunk,) = collate(rows).to(model.device).chunks
    logits: Tensor = model(input_ids=chunk.input_ids, use_cache=False).logits[chunk.predicts]
    # The collator may pack the rows in another order; their slots restore that of the completions. The softmax is in
    # float32 whatever the model's precision, as bfloat16 has less than three digits.
    return logits[chunk.slots.argsort()].float().log_softmax(-1)


def _sums(ours: Tensor, theirs: Tensor | None, completions: Sequence[Ids]) -> Tensor:
    # [5, completions]: the fields of Scores.
    lengths = [len(ids) for ids in completions]
    targets = torch.tensor([token for ids in completions for token in ids], device=ours.device)[:, None]
    if theirs is not None and theirs.shape != ours.shape:
        raise ValueError(
            f"reference: expected the policy's {ours.shape[1]} tokens, found a vocabulary of {theirs.shape[1]}"
        )
    p = ours.exp()
    entropy = -expectation(p, ours)
    missing = torch.full_like(entropy, torch.nan)
    reference = missing if theirs is None else theirs.gather(1, targets)[:, 0]
    divergence = missing if theirs is None else expectation(p, ours - theirs)
    logps = ours.gather(1, targets)[:, 0]
    per_token = torch.stack([logps, reference, entropy, divergence, torch.ones_like(entropy)])
    # In float64, as the divergence of a barely trained policy is a small difference of large sums.
    return torch.stack([tokens.double().sum(1) for tokens in torch.split(per_token, lengths, dim=1)], dim=1)
