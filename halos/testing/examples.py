"""Tiny batches with made-up log-probs, and an objective's answer to them."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from halos.data.batches.collate import Batch, StepSize, collate, step_size
from halos.data.rows.token_rows import Row
from halos.objectives.base import Objective, Output
from halos.policy.backbone import Backbone
from halos.policy.logprobs.completions import LogProbs

VOCABULARY = 23
HIDDEN = 8
Make = Callable[..., Objective]
"""Makes an objective from a backbone, and from parameters to change: a class, or a ``functools.partial`` of one."""


def tiny_backbone(*, moved: bool = False) -> Backbone:
    """A float64 Llama with two layers and its reference, which the policy has left if ``moved``."""
    return deepcopy(_backbone(moved))


@cache
def _backbone(moved: bool) -> Backbone:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = LlamaForCausalLM(config).double()
        _shift(policy, 0.3)
        backbone = Backbone(policy, with_reference=True)
        if moved:
            _shift(policy, 0.1)
    return backbone


def _shift(module: nn.Module, size: float) -> None:
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight), alpha=size)


def make_objective(make: Make, *, moved: bool = False, **changed: Any) -> Objective:
    """The objective on a tiny backbone in float64, the same in each call."""
    objective = make(tiny_backbone(moved=moved), **changed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        objective.configure_model()
        objective.double().train()
        for module in objective.children():
            if not isinstance(module, Backbone):  # heads often start at zero, where little can be told
                _shift(module, 0.3)
    objective.see_labels(4, 3)
    return objective


def tiny_rows(objective: Objective, count: int, *, labels: Sequence[bool] | None = None) -> list[Row]:
    """Ragged rows as the objective's view has them; each two neighbours share a prompt, labels alternate."""
    rng = random.Random(0)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, most)))

    prompts = [ids(5) for _ in range(count // 2 + 1)]
    rows = []
    for n in range(count):
        # The lengths of neighbours differ, and each second completion is longer than its prompt.
        branch_count = 1 + (objective.view == "pairs") + objective.needs.mismatched
        branches = tuple(ids(5 + 2 * (n % 2)) for _ in range(branch_count))
        label = labels[n] if labels is not None else n % 2 == 0
        scored = objective.view == "scored"
        rows.append(
            Row(
                id=f"example {n}",
                group=n // 2,
                prompt=prompts[n // 2],
                branches=branches,
                desirable=label if scored or objective.view == "binary" else None,
                score=(1 + rng.random()) * (1 if label else -1) if scored else None,
            )
        )
    return rows


@dataclass(slots=True)
class Inputs:
    """A batch with log-probs; ``leaves`` are the tensors that take gradient: token log-probs, perhaps states."""

    rows: Sequence[Row]
    batch: Batch
    policy: LogProbs
    reference: LogProbs | None
    leaves: list[Tensor]


def make_inputs(
    objective: Objective,
    rows: Sequence[Row],
    *,
    at_reference: bool = False,
    shift: float = 0.0,
    dtype: torch.dtype = torch.float64,
    wider: int = 0,
    step: StepSize | None = None,
) -> Inputs:
    """Log-probs that depend on a row's id alone, not on the batch round it.

    ``at_reference``: policy and reference agree, but for ``shift``; ``wider``: columns of padding beside the longest
    completion's.
    """
    batch = collate(rows, step=step or step_size(rows), mismatched=objective.needs.mismatched)
    mask = torch.nn.functional.pad(batch.mask, (0, wider))
    batch.mask = mask
    reference = _grid(rows, mask, "reference")
    policy = (reference + shift if at_reference else _grid(rows, mask, "policy")).masked_fill(~mask, 0.0)
    tokens = policy.to(dtype).requires_grad_()
    leaves, hidden = [tokens], None
    if objective.needs.hidden:
        states = torch.stack([_grid(rows, mask, f"state {h}") for h in range(HIDDEN)], dim=-1)
        hidden = states.to(dtype)
    return Inputs(
        rows,
        batch,
        LogProbs(tokens, mask, hidden, _last(rows, mask, dtype) if objective.needs.last_hidden else None),
        LogProbs(reference.to(dtype), mask) if objective.needs.reference else None,
        leaves,
    )


def _grid(rows: Sequence[Row], mask: Tensor, what: str) -> Tensor:
    grid = torch.zeros(mask.shape, dtype=torch.float64)
    for b, row in enumerate(rows):
        for k, branch in enumerate(row.branches):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{what}/{row.id}/{k}".encode()))
            grid[b, k, : len(branch)] = -2 * torch.rand(len(branch), generator=generator, dtype=torch.float64)
    return grid


def _last(rows: Sequence[Row], mask: Tensor, dtype: torch.dtype) -> Tensor:
    # The state of each completion's last token, [B, K, H].
    states = [_grid(rows, mask, f"last state {h}")[:, :, 0] for h in range(HIDDEN)]
    return torch.stack(states, dim=-1).to(dtype)


@dataclass(slots=True)
class Answer:
    """An objective's loss (divided by the step's counts), the gradient of each example's token log-probs, metrics."""

    loss: Tensor
    gradients: dict[str, Tensor]
    output: Output
    means: dict[str, tuple[float, float]] = field(default_factory=dict)


def loss_of(output: Output) -> Tensor:
    """Σ of the terms, each divided by its count in the whole step."""
    return torch.stack([term.total / (term.step_count or float("nan")) for term in output.loss.values()]).sum()


def ask(objective: Objective, inputs: Inputs) -> Answer:
    """Loss, gradients and metrics of one micro-batch."""
    output = objective.compute(inputs.batch, inputs.policy, inputs.reference)
    loss = loss_of(output)
    leaf = inputs.leaves[0]
    (gradient,) = torch.autograd.grad(loss, [leaf], allow_unused=True) if loss.requires_grad else (None,)
    gradient = torch.zeros_like(leaf) if gradient is None else gradient
    means = {**{f"loss/{name}": term for name, term in output.loss.items()}, **output.metrics}
    return Answer(
        loss.detach(),
        {row.id: gradient[b] for b, row in enumerate(inputs.rows)},
        output,
        {name: (_number(mean.total), _number(mean.count)) for name, mean in means.items()},
    )


def _number(value: Tensor | float) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)
