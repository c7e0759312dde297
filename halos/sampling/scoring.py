"""Exact scores of completions under a policy and its reference, token by token: log-probs, entropy, divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row, Span
from halos.policy.logprobs.compiling import uncompiled
from halos.policy.logprobs.head import ReadLogits, evaluating, run, scored_logits
from halos.policy.logprobs.token_statistics import expectation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = NDArray[np.float64]
Ids = Sequence[int]
Track = Callable[[Sequence[int]], Iterable[int]]
"""Iterates over the starts of batches, perhaps with a progress bar."""
HEAD_ROWS = 512
"""Tokens whose logits are in memory at a time."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over the tokens of each completion, its end-of-turn token included, in nats, [n].

    On samples from π_θ, the mean of ``logps − reference`` and the mean of ``divergence`` are both unbiased estimates of
    KL(π_θ ‖ π_ref) over whole completions. The second has the lower variance: each token's log-ratio is replaced by its
    expectation over the vocabulary. On other completions ``divergence`` measures how far apart the two models are at
    these completions, and is not an estimate of KL(π_θ ‖ π_ref).

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
    device: torch.device | None = None,
    as_reference: Callable[[], AbstractContextManager[object]] = nullcontext,
    track: Track = iter,
) -> Scores:
    """Score completions, each after its prompt, with the logits of a few tokens in memory at a time.

    Args:
        policy: π_θ.
        reference: π_ref, if there is one.
        policy_prompts: the prompts' token ids as the policy reads them, [n]; CSFT's end with a control token.
        reference_prompts: the prompts' token ids as the reference reads them, [n].
        completions: the completions' token ids, [n].
        contexts: the spans of each completion that are not scored, [n]; None: every token is.
        batch_size: completions in one forward.
        device: the device of the computation; None: that of the policy's weights.
        as_reference: makes a context in which ``reference`` computes as the reference, such as without its adapter.
        track: iterates over the batches.

    Raises:
        ValueError: a completion is empty, or the vocabularies of the models differ in size.
    """
    if any(not ids for ids in completions):
        raise ValueError("completions: expected at least one token in each, found an empty one")
    batches: list[Tensor] = []
    read = partial(_logits, device=device or policy.device)
    for start in track(range(0, len(completions), batch_size)):
        batch = slice(start, start + batch_size)
        batch_contexts = [() for _ in completions[batch]] if contexts is None else contexts[batch]
        rows = [
            Row("", n, (), (tuple(ids),), context=(tuple(spans),))
            for n, (ids, spans) in enumerate(zip(completions[batch], batch_contexts, strict=True))
        ]
        ours = read(policy, policy_prompts[batch], rows)
        with as_reference():
            theirs = None if reference is None else read(reference, reference_prompts[batch], rows)
        scored = [[row.branches[0][place] for place in row.scored(0)] for row in rows]
        batches.append(_sums(ours, theirs, scored, device or policy.device))
    columns = torch.cat(batches, dim=1) if batches else torch.zeros(5, 0)
    return Scores(*columns.double().cpu().numpy())


def _logits(
    model: PreTrainedModel, prompts: Sequence[Ids], completions: Sequence[Row], device: torch.device
) -> ReadLogits:
    # Of all scored tokens, completion by completion.
    rows = [replace(row, prompt=tuple(prompt)) for prompt, row in zip(prompts, completions, strict=True)]
    (chunk,) = collate(rows).to(device).chunks
    # The collator may pad the rows in another order; their slots restore that of the completions.
    order = chunk.slots.argsort()
    # Layers are compiled for the shapes of training.
    with uncompiled(model), evaluating(model):
        forward = partial(run, model, input_ids=chunk.input_ids)
        return scored_logits(model, forward, lambda states: states.flatten(0, 1)[chunk.predicts[order]])


def _sums(ours: ReadLogits, theirs: ReadLogits | None, completions: Sequence[Ids], device: torch.device) -> Tensor:
    # [5, completions]: the fields of Scores.
    lengths = [len(ids) for ids in completions]
    targets = torch.tensor([token for ids in completions for token in ids], device=device)
    starts = range(0, len(targets), HEAD_ROWS)
    parts = [_of_tokens(ours, theirs, targets, slice(start, start + HEAD_ROWS)) for start in starts]
    # In float64, as the divergence of a barely trained policy is a small difference of large sums.
    per_completion = torch.split(torch.cat(parts, dim=1).double(), lengths, dim=1)
    return torch.stack([tokens.sum(1) for tokens in per_completion], dim=1)


def _of_tokens(ours: ReadLogits, theirs: ReadLogits | None, targets: Tensor, rows: slice) -> Tensor:
    # [5, rows]: the fields of Scores, token by token.
    ids, log_p = targets[rows, None], ours(rows).log_softmax(-1)
    log_q = None if theirs is None else theirs(rows).log_softmax(-1)
    if log_q is not None and log_q.shape != log_p.shape:
        raise ValueError(
            f"reference: expected the policy's {log_p.shape[1]} tokens, found a vocabulary of {log_q.shape[1]}"
        )
    p, logps = log_p.exp(), log_p.gather(1, ids)[:, 0]
    missing = torch.full_like(logps, torch.nan)
    reference = missing if log_q is None else log_q.gather(1, ids)[:, 0]
    # Never negative but for rounding, which a sum of thousands of terms has; exactly 0 where both are the same.
    divergence = missing if log_q is None else expectation(p, log_p - log_q).clamp(min=0)
    return torch.stack([logps, reference, -expectation(p, log_p), divergence, torch.ones_like(logps)])
