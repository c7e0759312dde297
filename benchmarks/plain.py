"""The usual loop, for comparison: padded rows, full logits, a live reference, KTO's y' as rows of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.data.rows.token_rows import Row

BETA = 0.1
LOSSES = ("kto", "dpo")
"""The losses that this loop has."""


def pad(rows: Sequence[Row], branch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and, true at completion tokens, score mask [B, T] of one branch of each row."""
    full = [row.prompt + row.branches[branch] for row in rows]
    ids = torch.zeros(len(rows), max(map(len, full)), dtype=torch.long)
    attended, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for n, (row, tokens) in enumerate(zip(rows, full, strict=True)):
        ids[n, : len(tokens)] = torch.tensor(tokens)
        attended[n, : len(tokens)] = 1
        scored[n, len(row.prompt) : len(tokens)] = True
    return ids, attended, scored


def pad_both(rows: Sequence[Row]) -> tuple[Tensor, ...]:
    """:func:`pad` of all chosen completions and then all rejected ones, [2B, T]."""
    halves = [pad(rows, 0), pad(rows, 1)]
    width = max(ids.shape[1] for ids, _, _ in halves)
    return tuple(
        torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
        for parts in zip(*halves, strict=True)
    )


def logprobs(model: Any, ids: Tensor, attended: Tensor, scored: Tensor) -> Tensor:
    """log π(y|x) [B], summed over completion tokens."""
    logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1].float()
    tokens = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    return (tokens * scored[:, 1:]).sum(1)


def dpo(policy: Any, reference: Any, rows: Sequence[Row]) -> Tensor:
    """−log σ(β(r_w − r_l)), the mean over pairs; chosen and rejected in one forward."""
    both = pad_both(rows)
    with torch.no_grad():
        expected = logprobs(reference, *both)
    r_w, r_l = (logprobs(policy, *both) - expected).chunk(2)
    return -logsigmoid(BETA * (r_w - r_l)).mean()


def kto(policy: Any, reference: Any, rows: Sequence[Row]) -> Tensor:
    """1 − σ(±β(r − z₀)), the mean over completions, z₀ = max(0, mean r(x, y'))."""
    own, other = pad(rows, 0), pad(rows, 1)
    with torch.no_grad():
        z0 = (logprobs(policy, *other) - logprobs(reference, *other)).mean().clamp(min=0)
        expected = logprobs(reference, *own)
    r = logprobs(policy, *own) - expected
    sign = torch.tensor([1.0 if row.desirable else -1.0 for row in rows])
    return (1 - torch.sigmoid(BETA * sign * (r - z0))).mean()


Loss = Callable[[Any, Any, Sequence[Row]], Tensor]
"""A loss of (policy, reference, rows)."""


def loss_of(name: str) -> Loss:
    """The loss of that name."""
    return {"kto": kto, "dpo": dpo}[name]


def train(
    policy: Any, reference: Any, steps: Sequence[Sequence[Row]], compute: Loss, *, lr: float, precision: str
) -> list[float]:
    """One optimizer step for each list of rows; the losses."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0, fused=True)
    found = []
    for rows in steps:
        with cast_to(precision):
            value = compute(policy, reference, rows)
        value.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(value.detach()))
    return found


def cast_to(precision: str) -> AbstractContextManager[Any]:
    """The autocast of a precision."""
    make: partial[Any] = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    return make() if precision == "bf16-mixed" else nullcontext()
