"""The record of a run for its summary. Checkpoints contain it, so that a resumed run includes its beginning."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from halos.objectives.base import Objective
from halos.reporting.csv_metrics import CSVMetrics
from halos.reporting.tensorboard import truncate_events_after

State = dict[str, Any]
"""A checkpoint of Lightning, or the state of a callback in it. Its values may have any type."""
STORED = ("train_loss", "seconds", "validations")
"""Attributes of a record that checkpoints contain."""


class RunRecord(Callback):
    """Collects the losses of all steps, the last validation's metrics, and the time spent in training.

    Attributes:
        train_loss: one for each optimizer step; None for a step that was skipped because its loss was not finite.
        validations: the step and the metrics of each validation; names have no prefix ``val/``.
        seconds: the time spent in training, over all parts of a run that was stopped and resumed.
    """

    def __init__(self) -> None:
        self.train_loss: list[float | None] = []
        self.validations: list[tuple[int, dict[str, float]]] = []
        self.seconds = 0.0
        self._started = 0.0

    @property
    def val_metrics(self) -> dict[str, float]:
        """The metrics of the last validation; empty before the first."""
        return self.validations[-1][1] if self.validations else {}

    @property
    def validated_at(self) -> int | None:
        """The optimizer step of the last validation."""
        return self.validations[-1][0] if self.validations else None

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: State) -> None:
        # What the earlier part of this run has logged after the checkpoint will be logged again: without this, curves
        # would have two points at these steps.
        step = checkpoint["global_step"]
        validations = checkpoint["callbacks"].get(self.state_key, {}).get("validations")
        validated = bool(validations) and validations[-1][0] == step
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, CSVMetrics):
                logger.resume_at(step, validated=validated)
            elif isinstance(logger, TensorBoardLogger):
                truncate_events_after(Path(logger.log_dir), step, validated=validated)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    def take_losses(self, trainer: pl.Trainer) -> None:
        """Add the losses of the steps since the last call; all ranks call it together, before a checkpoint is written.

        Raises:
            FloatingPointError: a loss is not finite, and such steps are not to be skipped.
        """
        objective: Objective = trainer.lightning_module  # type: ignore[assignment]
        losses = objective.take_losses()
        self.train_loss += [loss if math.isfinite(loss) else None for loss in losses]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics.items()
        named = {name[len("val/") :]: float(value) for name, value in metrics if name.startswith("val/")}
        self.validations.append((trainer.global_step, named))

    def complete_validation(self, metrics: Mapping[str, float]) -> None:
        """Add metrics of the last validation that were measured after its end."""
        last_metrics = self.validations[-1][1]
        last_metrics |= {name: value for name, value in metrics.items() if name not in last_metrics}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.take_losses(trainer)
        self._count_seconds()
        self._started = 0.0  # a checkpoint that is written from now on adds no time

    def state_dict(self) -> State:
        if self._started:
            self._count_seconds()
        return {name: copy(getattr(self, name)) for name in STORED}

    def load_state_dict(self, state: State) -> None:
        for name in STORED:
            setattr(self, name, copy(state[name]))

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds, self._started = self.seconds + now - self._started, now


def peak_rss_mb() -> float:
    """Return the peak memory of this process, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB on Linux
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def peak_gpu_mb() -> float:
    """Return the peak memory of tensors on this process's GPU, in MiB; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
