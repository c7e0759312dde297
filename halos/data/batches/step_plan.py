"""How many optimizer steps a run has, and how many examples each of them reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The optimizer steps of a run.

    Attributes:
        steps: the number of steps; 0 until the run is planned.
        per_step: examples in a step, on all ranks.
        epoch_steps: steps of a Lightning epoch; None: the run is one Lightning epoch, also if it has several passes.
    """

    steps: int = 0
    per_step: int
    epoch_steps: int | None = None


def plan_of_trainer(trainer: pl.Trainer, *, examples: int, per_step: int) -> StepPlan:
    """Plan the steps of a plain Trainer. Its epoch is a pass over the data, rounded up to whole steps.

    Raises:
        ValueError: if the Trainer's limits leave no step, or end an epoch within a step.
    """
    accumulate, limit = trainer.accumulate_grad_batches, trainer.limit_train_batches
    epoch_batches = math.ceil(examples / per_step) * accumulate
    epoch_batches = min(epoch_batches, limit) if isinstance(limit, int) else int(epoch_batches * limit)
    if epoch_batches < 1 or epoch_batches % accumulate:
        raise ValueError(
            f"limit_train_batches: expected at least one step of accumulate_grad_batches={accumulate} batches, and "
            f"whole steps, found {limit} ({epoch_batches} batches)"
        )
    epoch_steps = epoch_batches // accumulate
    in_epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs * epoch_steps
    steps = fewest_steps(in_epochs, trainer.max_epochs, trainer.max_steps)
    return StepPlan(steps=steps, per_step=per_step, epoch_steps=epoch_steps)


def fewest_steps(in_epochs: int | None, epochs: int | None, max_steps: int) -> int:
    """Return the number of steps of a run.

    Args:
        in_epochs: the number of steps in all epochs; None: the number of epochs is not limited.
        epochs: the number of epochs, for the error.
        max_steps: the maximum number of steps; -1: no maximum.

    Raises:
        ValueError: if there is no limit, or one that allows no step.
    """
    limits = [steps for steps in (in_epochs, None if max_steps < 0 else max_steps) if steps is not None]
    if not limits or min(limits) < 1:
        raise ValueError(
            "expected trainer.max_epochs or trainer.max_steps to give at least one step, found "
            f"max_epochs={epochs}, max_steps={max_steps}"
        )
    return min(limits)
