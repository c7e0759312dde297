"""Puts what a person wants to see first onto a run's boards: rewards and KL, then replies, spread and parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from halos.objectives.base import Objective
from halos.reporting.boards import FINAL, Board, Layout, boards, has_boards

LAYOUT: Layout = {
    "rewards and KL": {
        "KL (val)": ["val/kl"],
        "rewards (val)": ["val/rewards/chosen", "val/rewards/rejected", "val/rewards/margins"],
        "rewards (train)": ["train/rewards/chosen", "train/rewards/rejected", "train/rewards/margins"],
    },
    "replies of the policy": {
        "length (tokens)": ["val/samples/length"],
        "win rate over the reference": ["val/samples/win_rate"],
        "share cut at the limit": ["val/samples/truncated"],
    },
    "log-ratios of the data": {
        f"log-ratios ({split})": [f"{split}/log_ratio/{kind}" for kind in ("chosen", "rejected", "mismatched")]
        for split in ("val", "train")
    },
}
"""Charts of several curves, where a board can draw them: KL next to the rewards comes first."""
FIRST = "alignment/"
"""Prefix of what is logged once more for the first section of a board, as its sections are in alphabetical order."""
FIRST_SECTION = (
    *("kl", "rewards/margins", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/auc"),
    *("samples/length", "samples/truncated", "samples/win_rate"),
)
HISTOGRAMS = 100
"""The most histograms of training rewards in a run; each waits for the device, and takes about a kilobyte."""


class BoardReport(Callback):
    """Lays out the boards, and logs the first section and histograms of rewards; other loggers are left alone."""

    def __init__(self) -> None:
        self._every = 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Once a run: TensorBoard's layout is an event like any other.
        for board in boards(trainer):
            board.lay_out(LAYOUT)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set when the Trainer is built
        steps = trainer.estimated_stepping_batches
        self._every = every * (math.ceil(steps / (every * HISTOGRAMS)) if math.isfinite(steps) else HISTOGRAMS)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        # Called after each micro-batch; the step of the last one is complete.
        step, accumulate = trainer.global_step, trainer.accumulate_grad_batches
        complete = (trainer.fit_loop.total_batch_idx + 1) % accumulate == 0
        if not complete or step % self._every or not has_boards(trainer) or not isinstance(pl_module, Objective):
            return
        if not any(trainer.num_val_batches):
            # Nothing is held out: the first section has the rewards of training.
            log_first(trainer, trainer.callback_metrics, "train/", under="train/")
        _log_histograms(boards(trainer), "train/", pl_module.step_rewards(), step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log_first(trainer, trainer.callback_metrics, "val/")
        if isinstance(pl_module, Objective):
            _log_histograms(boards(trainer), "val/", pl_module.labelled_rewards, trainer.global_step)


def log_first(trainer: pl.Trainer, metrics: Mapping[str, Tensor | float], prefix: str, *, under: str = "") -> None:
    """Log the metrics with this prefix that belong into the first section, there ``under`` a prefix of their own."""
    names = [name for name in FIRST_SECTION if prefix + name in metrics]
    values = {f"{FIRST}{under}{name}": float(metrics[prefix + name]) for name in names}
    for board in boards(trainer) if values else ():
        board.log_scalars(values, trainer.global_step)


def _log_histograms(on: list[Board], prefix: str, labelled: tuple[Tensor, Tensor] | None, step: int) -> None:
    if labelled is None:
        return
    rewards, labels = labelled
    for board in on:
        for name, kind in (("desirable", labels), ("undesirable", ~labels)):
            if kind.any():
                board.log_histogram(f"{prefix}rewards/{name}", rewards[kind], step)


def log_hparams(
    trainer: pl.Trainer, params: Mapping[str, object], validated: Mapping[str, float], samples: Mapping[str, float]
) -> None:
    """Log the run's parameters with the metrics by which runs are compared.

    Args:
        trainer: has the boards.
        params: by flat keys.
        validated: metrics of the last validation, whose curves the boards have.
        samples: metrics of the run's end.
    """
    others = (name for name in validated if name not in FIRST_SECTION)
    names = [*filter(validated.__contains__, FIRST_SECTION), *others]
    curves = {f"val/{name}": validated[name] for name in names}
    final = curves | {f"{FINAL}samples/{name}": value for name, value in samples.items()}
    for board in boards(trainer):
        board.log_hparams(params, final, trainer.global_step)
