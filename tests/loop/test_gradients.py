"""Gradients: clipped once for a step, and gone before the next."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from halos.objectives import (
    PPO,
    SFT,
)
from halos.optim import AdamW
from tests.loop_runs import InOrder, fit, objective_of, rows_for, tiny_backbone, trainer_for


class GradientsBeforeEachBatch(Callback):
    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.seen.append(any(p.grad is not None for p in module.parameters()))


def test_no_gradient_takes_memory_beside_the_next_steps_activations() -> None:
    before = GradientsBeforeEachBatch()
    data = InOrder(rows_for(SFT, 8), batch_size=2, mismatched=False)
    trainer_for(before, accumulate_grad_batches=2).fit(objective_of(SFT), datamodule=data)
    assert before.seen == [False, True, False, True]  # within a step they are added up


@pytest.mark.parametrize("policy_clip", [None, 0.25])
def test_the_critic_is_clipped_apart_from_the_policy(policy_clip: float | None) -> None:
    objective = objective_of(PPO, critic_clip=2.0)
    objective.configure_model()
    for parameter in objective.parameters():
        parameter.grad = torch.ones_like(parameter)

    def norm(module: torch.nn.Module) -> float:
        return math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters()))

    for parameter in objective.value_head.parameters():
        parameter.grad *= 100
    before = norm(objective.backbone)
    objective.configure_gradient_clipping(None, policy_clip, None)
    assert norm(objective.value_head) == pytest.approx(2.0, rel=1e-5)  # type: ignore[arg-type]
    assert norm(objective.backbone) == pytest.approx(policy_clip or before, rel=1e-5)


def test_clipping_each_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^trainer\.gradient_clip_algorithm: expected norm, found .*VALUE; "):
        fit(
            objective_of(SFT),
            rows_for(SFT, 4),
            batch_size=4,
            gradient_clip_val=1.0,
            gradient_clip_algorithm="value",
        )


def test_clipping_bounds_the_step() -> None:
    """AdamW hides the size of gradients, except of ones far below its ε."""
    optim = AdamW(lr=1.0, eps=1e3, warmup=0, schedule="constant")
    rows, start = rows_for(SFT, 4), tiny_backbone().policy.double()
    objective = SFT(tiny_backbone(with_reference=False), optim=optim)
    run = fit(objective, rows, batch_size=4, gradient_clip_val=0.01)
    moved = [run.weights[f"backbone.policy.{name}"] - p for name, p in start.named_parameters()]
    assert float(torch.nn.utils.get_total_norm(moved)) == pytest.approx(0.01 / 1e3, rel=1e-3)


def test_a_backbone_is_needed_before_a_step() -> None:
    with pytest.raises(ValueError, match="the objective has no backbone yet"):
        SFT().configure_gradient_clipping(None, 1.0, None)
