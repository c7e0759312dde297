"""Any objective, trained by a Lightning Trainer on a tiny Llama, for other tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from halos import objectives
from halos.data.batches.batch import Batch
from halos.data.batches.collate import Batches, collate
from halos.data.batches.order import Division, MicroBatch, validation_order
from halos.data.rows.token_rows import Row
from halos.objectives import (
    AOT,
    BCO,
    HALO,
    KTO,
    PPO,
    AOTUnpaired,
    BCOPair,
    EXORewards,
    InfoNCA,
    Mix,
    Objective,
    Output,
)
from halos.optim import AdamW
from halos.policy.backbone import Backbone
from halos.processes.collectives import data_ranks
from tests import tiny

REQUIRED: dict[Any, dict[str, Any]] = {
    Mix: {"parts": {"kto": KTO, "bco": partial(BCO, beta=0.2)}, "weights": {"kto": 1.0, "bco": 0.5}}
}
"""Parameters without a default."""


def described(kind: Any, **parameters: Any) -> Objective:
    """The objective without a backbone, for what it says of itself."""
    return kind if isinstance(kind, Objective) else kind(**REQUIRED.get(kind, {}), **parameters)


OBJECTIVES = [
    kind
    for kind in (getattr(objectives, name) for name in dir(objectives))
    if isinstance(kind, type) and issubclass(kind, Objective) and kind is not Objective
]
WITH_REFERENCE = [kind for kind in OBJECTIVES if described(kind).needs.reference]
COUPLED = [KTO, BCO, BCOPair, AOT, AOTUnpaired, EXORewards, HALO, InfoNCA, Mix, PPO]
"""Objectives whose loss has something that all examples of a micro-batch share."""
PER_EXAMPLE_OR_TOKEN = [kind for kind in OBJECTIVES if kind not in COUPLED]
SPEED = {"train/examples_per_second", "train/tokens_per_second"}


def tiny_backbone(
    *, with_reference: bool = True, moved: float = 0.0, dropout: float = 0.0, key_value_heads: int = 1
) -> Backbone:
    """The same in each call; ``moved`` flattens what the policy predicts, which makes random tokens likelier than
    they are under the reference."""
    model = tiny.model(attention_dropout=dropout, num_key_value_heads=key_value_heads)
    backbone = Backbone(model, with_reference=with_reference)
    with torch.no_grad():
        for parameter in backbone.policy.parameters():
            parameter.mul_(1 - moved)
    return backbone


def objective_of(
    kind: type[Objective], *, moved: float = 0.0, dropout: float = 0.0, key_value_heads: int = 1, **parameters: Any
) -> Objective:
    """An objective round a tiny backbone, with a rate at which a few steps change the losses visibly."""
    parameters = REQUIRED.get(kind, {}) | parameters
    with_reference = kind(**parameters).needs.reference
    model: dict[str, Any] = {"moved": moved, "dropout": dropout, "key_value_heads": key_value_heads}
    backbone = tiny_backbone(with_reference=with_reference, **model)
    return kind(backbone, optim=AdamW(lr=3e-3, warmup=0, schedule="constant"), **parameters)


def batch_of(kind: Any, rows: Sequence[Row], **options: Any) -> Batch:
    """The rows collated as the objective asks for."""
    kind = described(kind)
    return collate(rows, mismatched=kind.needs.mismatched, last_hidden=kind.needs.last_hidden, **options)


def rows_for(
    kind: type[Objective] | Objective, count: int, *, seed: int = 0, labels: Sequence[bool] | None = None
) -> list[Row]:
    """Ragged rows as the objective's view has them, with alternating labels unless given; three share a prompt where
    the objective compares the completions of one."""
    rng, objective = random.Random(seed), described(kind)

    def text(longest: int) -> tuple[int, ...]:
        return tuple(rng.randrange(tiny.VOCABULARY) for _ in range(rng.randint(1, longest)))

    rows = []
    for number in range(count):
        prompt, branches = text(6), (text(9), text(5))
        label = labels[number] if labels else number % 3 != 1
        rows.append(
            Row(
                id=f"example-{number}",
                group=number // 3 if objective.needs.grouped else number,
                prompt=prompt,
                branches=branches if objective.view == "pairs" or objective.needs.mismatched else branches[:1],
                desirable=label if objective.view in ("binary", "scored") else None,
                score=(0.5 + rng.random()) * (1 if label else -1) if objective.view == "scored" else None,
            )
        )
    return rows


class InOrder(pl.LightningDataModule):
    """The rows as they come: each stretch of batch_size × accumulate × ranks is a step, divided over micro-batches,
    and these over ranks."""

    def __init__(
        self,
        rows: list[Row],
        *,
        batch_size: int,
        mismatched: bool = False,
        last_hidden: bool = False,
        val: Sequence[Row] = (),
        label_counts: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.last_hidden = last_hidden
        self.rows, self.val, self.batch_size, self.mismatched = rows, list(val), batch_size, mismatched
        self.label_counts = label_counts

    def train_dataloader(self) -> DataLoader[Batch]:
        n, (rank, ranks) = self.batch_size, data_ranks(self.trainer)
        per_step = n * ranks * self.trainer.accumulate_grad_batches
        order = []
        for start in range(0, len(self.rows), per_step):
            step = tuple(range(start, start + per_step))
            order += [MicroBatch(step[i : i + n], step) for i in range(rank * n, per_step, n * ranks)]
        return self._loader(self.rows, order)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        if not self.val:
            return []
        rank, ranks = data_ranks(self.trainer)
        division = Division(batch_size=self.batch_size, world_size=ranks, rank=rank)
        return self._loader(self.val, validation_order(len(self.val), division))

    def _loader(self, rows: list[Row], order: list[MicroBatch]) -> DataLoader[Batch]:
        batches = Batches(rows, partial(collate, mismatched=self.mismatched, chunks=2, last_hidden=self.last_hidden))
        return DataLoader(batches, sampler=order, batch_size=None)


@dataclass
class Run:
    """What a training run left behind: train metrics and averaged gradients of each step, and the end."""

    steps: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    val: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        return [metrics["train/loss"] for metrics in self.steps]


class Recorder(Callback):
    def __init__(self) -> None:
        self.run = Run()

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        self.run.gradients.append(gradients)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.run.steps):
            metrics = trainer.callback_metrics
            self.run.steps.append({name: float(metrics[name]) for name in metrics if name.startswith("train/")})


def trainer_for(*callbacks: Callback, ranks: int = 1, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": ranks,
        "strategy": "ddp" if ranks > 1 else "auto",
        "precision": "64-true",
        "max_epochs": 1,
        "callbacks": list(callbacks),
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**defaults | options)


def fit(
    objective: Objective,
    rows: list[Row],
    *,
    batch_size: int,
    val: Sequence[Row] = (),
    label_counts: tuple[int, int] | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Run:
    """Train for one pass over the rows, in float64 unless told otherwise."""
    recorder = Recorder()
    asked = {"mismatched": objective.needs.mismatched, "last_hidden": objective.needs.last_hidden}
    data = InOrder(rows, batch_size=batch_size, val=val, label_counts=label_counts, **asked)
    trainer = trainer_for(recorder, *callbacks, **options)
    trainer.fit(objective, datamodule=data)
    metrics = trainer.callback_metrics
    recorder.run.val = {name: float(metrics[name]) for name in metrics if name.startswith("val/")}
    recorder.run.weights = {name: p.detach().clone() for name, p in objective.named_parameters()}
    return recorder.run


def assert_same(found: Run, expected: Run) -> None:
    """The same gradients and weights but for rounding in float64, and the same metrics as float32 logs them."""
    assert len(found.steps) == len(expected.steps) > 0
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-7, atol=1e-9)
    for mine, theirs in zip([*found.steps, found.val], [*expected.steps, expected.val], strict=True):
        assert mine.keys() - SPEED == theirs.keys() - SPEED
        for name in mine.keys() - SPEED:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-8), name


def evaluate(objective: Objective, batch: Batch) -> Output:
    """The objective's output for a batch, in float64, without a Trainer."""
    objective.configure_model()
    objective.double()
    policy = objective.backbone.logprobs(batch, with_hidden=objective.needs.hidden)
    reference = objective.backbone.reference_logprobs(batch) if objective.needs.reference else None
    return objective.compute_clamped(batch, policy, reference)


def loss_of(output: Output) -> Tensor:
    return torch.stack([term.total / term.step_count for term in output.loss.values()]).sum()
