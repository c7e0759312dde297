"""Tiny batches with made-up log-probs, and what an objective computes from them."""

import random
import zlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor, nn

from halos.data.batches.batch import Batch, StepSize
from halos.data.batches.collate import collate, step_size
from halos.data.preparation.needs import DataNeeds
from halos.data.rows.joint_rows import joint_row
from halos.data.rows.token_rows import Row, ViewRows
from halos.objectives.base import Objective, Output
from halos.policy.backbone import Backbone
from halos.policy.logprobs.completions import LogProbs

VOCABULARY = 23
HIDDEN = 8
Make = Callable[..., Objective]
"""Makes an objective from a backbone and changed parameters: a class, or a ``functools.partial`` of one."""


def tiny_backbone(*, moved: bool = False) -> Backbone:
    """A float64 Llama with two layers as policy and its reference, equal to it unless ``moved``."""
    return deepcopy(_backbone(moved))


@cache
def _backbone(moved: bool) -> Backbone:
    from transformers import LlamaConfig, LlamaForCausalLM

    # Without a padding id, because masks come from positions, and no objective may derive them from token ids.
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


def make_objective(
    make: Make, *, moved: bool = False, dtype: torch.dtype = torch.float64, **changed: float
) -> Objective:
    """The objective on a tiny backbone, with equal weights in each call.

    Args:
        make: see :data:`Make`.
        moved: whether the policy differs from the reference. Only such an objective may be trained: all others share
            one backbone, because copying takes longer than most losses.
        dtype: the type of the objective's weights.
        changed: parameters of the constructor to change.
    """
    shared = not moved and dtype == torch.float64
    objective = make(_backbone(moved) if shared else tiny_backbone(moved=moved), **changed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        objective.configure_model()
        objective.double().train()
        for module in objective.children():
            # Heads often start at zero, where most gradients vanish and an error would go unnoticed.
            if not isinstance(module, Backbone):
                _shift(module, 0.3)
    # Unequal numbers: weights that are set automatically must differ, so that swapping them shows.
    objective.see_labels(4, 3)
    return objective if dtype == torch.float64 else objective.to(dtype)


def tiny_rows(objective: Objective, count: int, *, labels: Sequence[bool] | None = None) -> list[Row]:
    """Make ``count`` rows of the objective's view, with completions of different lengths.

    Rows share a prompt in pairs. Labels alternate unless ``labels`` [count] are passed. For a mixture of several views
    the rows are records: a pair with its examples in the other views or, without pairs, a labelled completion.
    """
    if views := objective.data_needs().views:
        return _tiny_records(views, count, labels)
    return _tiny_rows(objective.view, count, labels, mismatched=objective.needs.mismatched)


def _tiny_rows(view: str, count: int, labels: Sequence[bool] | None, *, mismatched: bool, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)

    def ids(max_length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, max_length)))

    prompts = [ids(5) for _ in range(count // 2 + 1)]
    scored = view == "scored"
    branch_count = 1 + (view == "pairs") + mismatched
    rows = []
    for n in range(count):
        # Neighbours differ in length, and each second completion may be longer than its prompt.
        branches = tuple(ids(5 + 2 * (n % 2)) for _ in range(branch_count))
        label = labels[n] if labels is not None else n % 2 == 0
        score = (1 + rng.random()) * (1 if label else -1) if scored else None
        desirable = label if scored or view == "binary" else None
        row = Row(f"example {n}", n // 2, prompts[n // 2], branches, desirable, score)
        rows.append(_graded(row, n) if view == "pairs" else row)
    return rows


def _tiny_records(views: Sequence[DataNeeds], count: int, labels: Sequence[bool] | None) -> list[Row]:
    paired = any(needs.view == "pairs" for needs in views)
    base = _tiny_rows("pairs" if paired else "scored", count, labels, mismatched=False)
    others = _tiny_rows("pairs", count, None, mismatched=False, seed=1)
    records = []
    for row, other in zip(base, others, strict=True):
        of_views = [ViewRows(needs.view, _of_record(row, other, needs), needs.flags.mismatched) for needs in views]
        record = joint_row(row.id, row.group, of_views)
        records.append(replace(record, desirable=row.desirable))
    return records


def _of_record(row: Row, other: Row, needs: DataNeeds) -> tuple[Row, ...]:
    # The examples of one view: of a pair, or of one completion with a score.
    if needs.view == "pairs":
        examples = [row]
    else:
        goods = [True, False] if len(row.branches) == 2 else [bool(row.desirable)]
        plain = replace(row, margin=None, score_chosen=None, score_rejected=None, desirable=None, score=None)
        examples = [replace(plain, branches=(row.branches[k],), desirable=good) for k, good in enumerate(goods)]
        if needs.view == "demonstrations":
            examples = [replace(one, desirable=None) for one in examples if one.desirable]
        elif needs.view == "scored":
            scores = [2.0, -1.0] if row.score is None else [row.score]
            examples = [replace(one, score=score) for one, score in zip(examples, scores, strict=True)]
    if needs.flags.mismatched:
        examples = [replace(one, branches=(*one.branches, other.branches[k % 2])) for k, one in enumerate(examples)]
    return tuple(replace(one, id=f"{row.id}#{k}") for k, one in enumerate(examples))


def mapped(row: Row, function: Callable[[Row], Row]) -> Row:
    """Return a row to which a function was applied, and to its examples if it is a record of several views."""
    views = [replace(view, rows=tuple(map(function, view.rows))) for view in row.views]
    return replace(function(row), views=tuple(views))


def _graded(row: Row, n: int) -> Row:
    # A pair's margin and scores, exact in float32; from generators of their own, which change nothing of other rows.
    rejected, difference = random.Random(n).randrange(1, 8), random.Random(-n - 1).randrange(1, 8)
    chosen = rejected + difference
    return replace(row, margin=difference / 4, score_chosen=chosen / 16, score_rejected=rejected / 16)


@dataclass(slots=True)
class Inputs:
    """What an objective's ``compute`` takes: a batch with its log-probs.

    Attributes:
        rows: the batch's rows; results are named by their ids.
        batch: the collated rows.
        policy: made-up log-probs, whose ``tokens`` are a leaf that takes gradient.
        reference: made-up log-probs, or None for objectives without a reference.
    """

    rows: Sequence[Row]
    batch: Batch
    policy: LogProbs
    reference: LogProbs | None


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
    """Make a batch of the rows, with log-probs that depend only on a row's id, not on the rest of the batch.

    Args:
        objective: the objective, for its view and needs.
        rows: the examples.
        at_reference: whether the policy's log-probs are the reference's plus ``shift`` nats.
        shift: see ``at_reference``.
        dtype: the type of the log-probs and states.
        wider: columns of padding to add after the longest completion.
        step: the counts of the whole step (default: those of the rows).
    """
    batch = collate(rows, step=step or step_size(rows), mismatched=objective.needs.mismatched)
    for grid in (batch, *batch.views):
        grid.mask = torch.nn.functional.pad(grid.mask, (0, wider))
    mask = batch.mask
    reference = _grid(rows, mask, "reference")
    policy = (reference + shift if at_reference else _grid(rows, mask, "policy")).masked_fill(~mask, 0.0)
    hidden = _states(rows, mask, "state").to(dtype) if objective.needs.hidden else None
    last = _states(rows, mask, "last state")[:, :, 0].to(dtype) if objective.needs.last_hidden else None
    log_ref = LogProbs(reference.to(dtype), mask) if objective.needs.reference else None
    logprobs = LogProbs(policy.to(dtype).requires_grad_(), mask, hidden, last)
    if objective.needs.log_collision:
        logprobs.log_collision = _grid(rows, mask, "collision").to(dtype)
    if objective.needs.divergence:
        # 0 or more, and 0 where the models are equal.
        logprobs.divergence = (-_grid(rows, mask, "divergence") * (not at_reference)).to(dtype)
    return Inputs(rows, batch, logprobs, log_ref)


def _grid(rows: Sequence[Row], mask: Tensor, what: str) -> Tensor:
    # Numbers in (-2, 0], [B, K, C], seeded by the row's id: the same row has them in every batch.
    grid = torch.zeros(mask.shape, dtype=torch.float64)
    for b, row in enumerate(rows):
        for k, branch in enumerate(row.branches):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{what}/{row.id}/{k}".encode()))
            grid[b, k, : len(branch)] = -2 * torch.rand(len(branch), generator=generator, dtype=torch.float64)
    return grid


def _states(rows: Sequence[Row], mask: Tensor, what: str) -> Tensor:
    # Hidden states [B, K, C, H].
    return torch.stack([_grid(rows, mask, f"{what} {h}") for h in range(HIDDEN)], dim=-1)


@dataclass(slots=True)
class Result:
    """What an objective computes from one micro-batch.

    Attributes:
        loss: the loss, divided by the counts of the step.
        gradients: the gradient of the loss with respect to the token log-probs of each example, [K, C], by id.
        output: what ``compute`` returned.
        means: (sum, count) of each loss term and metric.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    output: Output
    means: dict[str, tuple[float, float]] = field(default_factory=dict)


def loss_of(output: Output) -> Tensor:
    """The loss: the sum of the terms, each divided by its count in the whole step."""
    return torch.stack([term.of_step for term in output.loss.values()]).sum()


def evaluate(objective: Objective, inputs: Inputs) -> Result:
    """Loss, gradients and metrics of one micro-batch."""
    # compute(), not compute_clamped(): the kit checks the loss itself, without humanline's clamp.
    output = objective.compute(inputs.batch, inputs.policy, inputs.reference)
    loss, tokens = loss_of(output), inputs.policy.tokens
    (gradient,) = torch.autograd.grad(loss, [tokens], allow_unused=True) if loss.requires_grad else (None,)
    gradient = torch.zeros_like(tokens) if gradient is None else gradient
    gradients = {row.id: gradient[b] for b, row in enumerate(inputs.rows)}
    means = {**{f"loss/{name}": term for name, term in output.loss.items()}, **output.metrics}
    numbers = {name: (_number(mean.total), _number(mean.count)) for name, mean in means.items()}
    return Result(loss.detach(), gradients, output, numbers)


def _number(value: Tensor | float) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)
