"""The progress bar: loss, margin, KL and examples per second."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

SHOWN = {"loss": "loss", "rewards/margins": "margin", "examples_per_second": "examples/s"}
"""Metrics of training that are shown, and their short names."""


class Progress(RichProgressBar):
    """Lightning's rich bar with few metrics under short names."""

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        # Not all that is logged: a bar with every metric is wider than a terminal.
        metrics = trainer.progress_bar_metrics
        shown: dict[str, int | str | float | dict[str, float]] = {}
        shown |= {short: metrics[f"train/{name}"] for name, short in SHOWN.items() if f"train/{name}" in metrics}
        kl = trainer.callback_metrics.get("val/kl")  # of the last validation
        return shown if kl is None else shown | {"KL": float(kl)}
