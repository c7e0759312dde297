"""What a run did, for its summary; kept in checkpoints, so that a resumed run knows of its beginning."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from halos.runs.loggers import CSVMetrics


class RunRecord(Callback):
    """Losses of every step, the last validation's metrics, and seconds spent in training."""

    def __init__(self) -> None:
        self.train_loss: list[float] = []
        self.val_metrics: dict[str, float] = {}
        self.validated_at: int | None = None
        self.seconds = 0.0
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        for logger in trainer.loggers:
            if isinstance(logger, CSVMetrics) and trainer.global_step:
                logger.resume_at(trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step > len(self.train_loss):
            self.train_loss.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.val_metrics = {name.removeprefix("val/"): value for name, value in found.items()}
        self.validated_at = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count_seconds()
        self._started = 0.0  # a checkpoint saved from now on adds nothing

    def state_dict(self) -> dict[str, Any]:
        if self._started:
            self._count_seconds()
        return {"train_loss": list(self.train_loss), "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.train_loss, self.seconds = list(state["train_loss"]), state["seconds"]

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds, self._started = self.seconds + now - self._started, now


def peak_rss_mb() -> float:
    """The most memory that this process has held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def peak_gpu_mb() -> float:
    """The most memory that tensors have held on this process's GPU, in MiB; 0 without one."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
