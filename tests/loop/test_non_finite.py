"""A loss or gradient that is not finite stops the run with its examples and leaves the weights."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from halos.data.batches.batch import Batch
from halos.objectives import (
    SFT,
    Output,
)
from halos.policy.logprobs.completions import LogProbs
from tests.fork import run_ranks
from tests.loop_runs import InOrder, fit, objective_of, rows_for, trainer_for


class Broken(SFT):
    """SFT whose loss, or only its gradient, is not finite for one example."""

    def __init__(self, *args: Any, loss: bool, **base: Any) -> None:
        super().__init__(*args, **base)
        self.breaks_loss = loss

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        output = super().compute(batch, policy, reference)
        if "example-9" in batch.ids:
            term = output.loss["sft"]
            # √0 has an infinite slope.
            term.total = term.total + ((term.total - term.total.detach()).sqrt() if not self.breaks_loss else math.nan)
        return output


class WeightsOfEachStep(Callback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.seen.append(torch.cat([p.detach().flatten() for p in module.parameters()]))


def _broken_run(loss: bool, ranks: int, accumulate: int) -> tuple[str, bool, bool]:
    # The error, whether the step before it changed the weights, and whether it did.
    objective, before = objective_of(Broken, loss=loss), WeightsOfEachStep()
    data = InOrder(rows_for(SFT, 12), batch_size=4 // (ranks * accumulate), mismatched=False)
    trainer = trainer_for(before, ranks=ranks, accumulate_grad_batches=accumulate)
    with pytest.raises(FloatingPointError) as error:
        trainer.fit(objective, datamodule=data)
    before.on_train_batch_start(trainer, objective)
    return (
        str(error.value),
        not torch.equal(before.seen[0], before.seen[accumulate]),
        not torch.equal(before.seen[2 * accumulate], before.seen[-1]),
    )


@pytest.mark.parametrize("loss", [True, False], ids=["loss", "gradient"])
@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (1, 2), pytest.param(2, 1, marks=pytest.mark.ranks)])
def test_a_non_finite_step_stops_with_its_examples_and_leaves_the_weights(
    loss: bool, ranks: int, accumulate: int
) -> None:
    run = partial(_broken_run, loss, ranks, accumulate)
    results = run_ranks(run) if ranks > 1 else [run()]
    for message, moved, spoilt in results:
        what = "loss" if loss else "grad_norm"
        assert message.startswith(f"{what} is nan at step 3;") or message.startswith(f"{what} is inf at step 3;")
        assert message.endswith("Examples of this step: example-8, example-9, example-10, example-11")
        assert moved
        assert not spoilt


@pytest.mark.parametrize("loss", [True, False], ids=["loss", "gradient"])
def test_a_non_finite_step_that_was_not_logged_is_found_later(loss: bool) -> None:
    objective = objective_of(Broken, loss=loss)
    with pytest.raises(FloatingPointError) as error:
        fit(objective, rows_for(SFT, 20), batch_size=4, log_every_n_steps=4)
    assert re.match(r"(loss|grad_norm) is (nan|inf) at step 3; the weights are spoilt", str(error.value))
    assert str(error.value).endswith("Examples of this step: example-8, example-9, example-10, example-11")
    assert objective.trainer.global_step == 3  # of step 4 the metrics were to be logged


def test_a_non_finite_step_is_found_at_the_end_if_none_is_logged() -> None:
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 3; "):
        fit(objective_of(Broken, loss=True), rows_for(SFT, 12), batch_size=4, log_every_n_steps=50)


def test_a_non_finite_validation_names_its_examples() -> None:
    rows = rows_for(SFT, 12)
    with pytest.raises(FloatingPointError) as error:
        fit(objective_of(Broken, loss=True), rows[:4], val=rows, batch_size=4)
    assert str(error.value) == (
        "the validation loss is nan after step 1; the last good checkpoint is kept. "
        "Examples: example-8, example-9, example-10, example-11"
    )
