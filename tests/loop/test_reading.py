"""When the metrics of steps are read and logged, and how fast the steps were."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from halos.loop.steps import Step, Steps
from halos.objectives import (
    DPO,
    KTO,
    PPO,
    SFT,
)
from halos.optim import AdamW
from tests.loop_runs import SPEED, fit, objective_of, rows_for, tiny_backbone


def test_the_logged_gradient_norm_is_that_before_clipping() -> None:
    run = fit(objective_of(PPO), rows_for(PPO, 4), batch_size=4, gradient_clip_val=1e-3)
    (metrics,), (gradients,) = run.steps, run.gradients
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert norm > 0.1


def test_the_logged_rate_is_the_one_the_step_used() -> None:
    optim = AdamW(lr=1e-3, warmup=2, schedule="linear")
    run = fit(SFT(tiny_backbone(with_reference=False), optim=optim), rows_for(SFT, 8), batch_size=2)
    rates = [metrics["train/lr"] for metrics in run.steps]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 0.5e-3], rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_speed_counts_every_example_and_token_of_a_step(accumulate: int) -> None:
    rows = rows_for(DPO, 8)
    run = fit(objective_of(DPO), rows, batch_size=4 // accumulate, accumulate_grad_batches=accumulate)
    for start, metrics in zip((0, 4), run.steps, strict=True):
        tokens = sum(len(row.prompt) + len(branch) for row in rows[start : start + 4] for branch in row.branches)
        ratio = metrics["train/tokens_per_second"] / metrics["train/examples_per_second"]
        assert ratio == pytest.approx(tokens / 4, rel=1e-6)
        assert metrics["train/examples_per_second"] > 0


def test_a_clock_too_coarse_for_a_step_gives_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halos.loop.steps.time.perf_counter", lambda: 12.0)
    (metrics,) = fit(objective_of(DPO), rows_for(DPO, 4), batch_size=4).steps
    assert not SPEED & metrics.keys()


def test_loggers_get_the_metrics_of_every_nth_step() -> None:
    class Lines(DummyLogger):
        seen: ClassVar[list[tuple[int, float]]] = []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            Lines.seen += [(step, metrics[name]) for name in metrics if name == "train/loss"]

    each = fit(objective_of(SFT), rows_for(SFT, 10), batch_size=2)
    fit(objective_of(SFT), rows_for(SFT, 10), batch_size=2, logger=Lines(), log_every_n_steps=2)
    assert Lines.seen == [(step, pytest.approx(each.losses[step - 1], rel=1e-6)) for step in (2, 4)]


@pytest.mark.parametrize(("every", "reads"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (50, [5])])
def test_metrics_are_read_when_a_step_is_logged_and_at_the_end(
    every: int, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []  # the steps of each reading
    read, objective = Steps.read, objective_of(KTO)

    def counted(steps: Steps, ranks: int) -> list[tuple[Step, dict[str, float]]]:
        found = read(steps, ranks)
        seen.append(len(found))
        return found

    monkeypatch.setattr(Steps, "read", counted)
    rows = rows_for(KTO, 20, labels=[True, False] * 10)
    run = fit(objective, rows, batch_size=2, accumulate_grad_batches=2, log_every_n_steps=every)
    assert seen == reads
    losses = objective.take_losses()
    assert len(losses) == 5
    assert objective.take_losses() == []
    expected = fit(objective_of(KTO), rows, batch_size=2, accumulate_grad_batches=2)
    assert losses == pytest.approx(expected.losses, rel=1e-6)
    torch.testing.assert_close(run.weights, expected.weights, rtol=1e-9, atol=1e-12)
