"""The progress bar: loss, margin, KL and examples a second."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

SHOWN = {"loss": "loss", "rewards/margins": "margin", "kl": "KL", "examples_per_second": "examples/s"}


class Progress(RichProgressBar):
    """Lightning's rich bar with short names and nothing else."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        found = trainer.progress_bar_metrics
        return {short: found[f"train/{name}"] for name, short in SHOWN.items() if f"train/{name}" in found}
