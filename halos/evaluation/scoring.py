"""What a policy and its reference say of completions, token by token: log-probs, entropy, KL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.policy.logprobs.token_statistics import expectation

Array = NDArray[np.float64]
Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over each completion's tokens (end-of-turn token included), in nats, [n].

    ``logps``: log π_θ(y|x). ``reference``: log π_ref(y|x). ``entropy``: Σ_t H(π_θ(·|x, y_<t)). ``kl``:
    Σ_t KL(π_θ(·|x, y_<t) ‖ π_ref(·|x, y_<t)), each over the whole vocabulary. ``tokens``: how many. ``reference`` and
    ``kl`` are NaN without a reference.

    Of samples from π_θ, the mean of ``logps − reference`` and the mean of ``kl`` both estimate KL(π_θ ‖ π_ref) of whole
    completions without bias (the second is the first with each token's share replaced by its expectation, and varies
    less). Of other completions ``kl`` says how far the two are apart where the data went.
    """

    logps: Array
    reference: Array
    entropy: Array
    kl: Array
    tokens: Array

    @property
    def log_ratios(self) -> Array:
        """r_θ(x, y) = log π_θ(y|x) − log π_ref(y|x), [n]."""
        return self.logps - self.reference


@torch.no_grad()
def score(
    policy: Any,
    reference: Any | None,
    policy_prompts: Sequence[Sequence[int]],
    reference_prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    track: Track = iter,
) -> Scores:
    """Score the completions' ids, each behind its prompt's.

    The two models may be asked with different prompts: a policy trained by CSFT reads a control token, its reference
    does not. Raises ``ValueError`` if their vocabularies differ in size.
    """
    if any(not ids for ids in completions):
        raise ValueError("completions: expected at least one token in each, found an empty one")
    starts = range(0, len(completions), batch_size)
    parts: list[Tensor] = []
    for start in track(starts):
        part = slice(start, start + batch_size)
        said = completions[part]
        ours = _distributions(policy, policy_prompts[part], said)
        theirs = None if reference is None else _distributions(reference, reference_prompts[part], said)
        parts.append(_sums(ours, theirs, said))
    columns = torch.cat(parts, dim=1) if parts else torch.zeros(5, 0)
    return Scores(*columns.double().cpu().numpy())


def _distributions(model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Tensor:
    # log π(· | x, y_<t) [M, V] at all completion tokens, completion by completion.
    rows = [Row(str(i), i, tuple(p), (tuple(c),)) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))]
    (chunk,) = collate(rows).to(model.device).chunks
    logits = model(input_ids=chunk.input_ids, use_cache=False).logits[chunk.predicts]
    return logits[chunk.slots.argsort()].float().log_softmax(-1)


def _sums(ours: Tensor, theirs: Tensor | None, completions: Sequence[Sequence[int]]) -> Tensor:
    lengths = [len(ids) for ids in completions]
    targets = torch.tensor([token for ids in completions for token in ids], device=ours.device)[:, None]
    if theirs is not None and theirs.shape != ours.shape:
        raise ValueError(
            f"reference: expected a vocabulary of {ours.shape[1]} tokens as the policy has, found {theirs.shape[1]}"
        )
    p = ours.exp()
    entropy = -expectation(p, ours)
    nothing = torch.full_like(entropy, torch.nan)
    reference = nothing if theirs is None else theirs.gather(1, targets)[:, 0]
    kl = nothing if theirs is None else expectation(p, ours - theirs)
    per_token = torch.stack([ours.gather(1, targets)[:, 0], reference, entropy, kl, torch.ones_like(entropy)])
    return torch.stack([part.double().sum(1) for part in per_token.split(lengths, dim=1)], dim=1)
