"""Adds to TensorBoard what Lightning does not log: a layout, histograms, texts, and parameters with final metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from halos.files import PART, atomic_file, remove
from halos.objectives.base import Objective

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SIDES = {
    "rewards": ("rewards/chosen", "rewards/rejected", "rewards/margins"),
    "log-ratios": ("log_ratio/chosen", "log_ratio/rejected", "log_ratio/mismatched"),
}
CHARTS = {"KL (val)": ["val/kl"]} | {
    f"{kind} ({split})": [f"{split}/{name}" for name in names]
    for kind, names in SIDES.items()
    for split in ("train", "val")
}
LAYOUT = {"alignment": {title: ["Multiline", tags] for title, tags in CHARTS.items()}}
"""Custom scalars: KL, rewards of both kinds and their margin in one chart, and log-ratios in another."""

FIRST_PAGE = ("kl", "rewards/margins", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/auc")
"""Metrics of validation that are logged once more under ``alignment/``, the first section that TensorBoard shows."""
FINAL = "val/final/"
"""Prefix of the final metrics, which belong to the parameters of a run."""


class TensorBoardReport(Callback):
    """Logs the layout, the first page and histograms of rewards to TensorBoard; other loggers are left alone."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Once a run: the layout is an event like any other.
        for writer in writers(trainer):
            writer.add_custom_scalars(LAYOUT)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        for writer in writers(trainer):
            for name in (name for name in FIRST_PAGE if f"val/{name}" in metrics):
                writer.add_scalar(f"alignment/{name}", float(metrics[f"val/{name}"]), trainer.global_step)
        if not isinstance(pl_module, Objective) or pl_module.labelled_rewards is None:
            return
        rewards, labels = pl_module.labelled_rewards
        for writer in writers(trainer):
            for name, kind in (("desirable", labels), ("undesirable", ~labels)):
                if kind.any():
                    writer.add_histogram(f"val/rewards/{name}", rewards[kind], trainer.global_step)


def log_text(trainer: pl.Trainer, tag: str, texts: list[str]) -> None:
    """Log texts, one below the other, at the current step."""
    for writer in writers(trainer):
        writer.add_text(tag, "\n\n---\n\n".join(texts), trainer.global_step)


def log_hparams(trainer: pl.Trainer, params: Mapping[str, object], metrics: Mapping[str, float]) -> None:
    """Log the run's parameters with its final metrics, so that TensorBoard can compare runs."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # Under names of their own: TensorBoard records them at step 0, where a curve would begin with its end.
            logger.log_hyperparams(dict(params), {f"{FINAL}{name}": value for name, value in metrics.items()})
            logger.save()


def truncate_events_after(folder: Path, step: int, *, validated: bool) -> None:
    """Remove from a folder's event files what a run that resumes at ``step`` will log again.

    These are all events after the step, those of the run's end, and those of the step's own validation unless it was
    done before the checkpoint. A file that is cut off in the middle of an event keeps the events before it.

    Args:
        folder: the logger's folder.
        step: optimizer step of the checkpoint.
        validated: whether the step was validated before the checkpoint was written.
    """
    # SummaryWriter's purge_step would hide events by their step alone. It cannot keep the training metrics of a step
    # and drop the validation of the same step, nor drop the final metrics, which TensorBoard has at step 0.
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    def is_logged_again(event: Event) -> bool:
        tags = [value.tag for value in event.summary.value]
        if event.step > step or any(tag.startswith(FINAL) for tag in tags):
            return True
        of_validation = any(tag.startswith(("val/", "alignment/", "samples")) for tag in tags)
        return event.step == step and of_validation and not validated

    for part in folder.glob(f"*{PART}"):  # of a process that was killed here; TensorBoard would read it too
        remove(part)
    for path in sorted(folder.glob("events.out.tfevents.*")):
        records = list(RawEventFileLoader(str(path)).Load())
        remaining = [record for record in records if not is_logged_again(Event.FromString(record))]
        if len(remaining) == len(records):
            continue
        with atomic_file(path) as part, part.open("wb") as stream:
            writer = RecordWriter(stream)
            for record in remaining:
                writer.write(record)


def writers(trainer: pl.Trainer) -> list[SummaryWriter]:
    """The writers of the run's TensorBoard loggers; none on other processes than the first."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
