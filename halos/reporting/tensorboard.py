"""What TensorBoard shows beyond scalars: a layout, histograms of rewards, sampled completions, hparams."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from halos.objectives.base import Objective

LAYOUT = {
    "alignment": {
        f"{kind} ({split})": ["Multiline", [f"{split}/{name}" for name in names]]
        for split in ("train", "val")
        for kind, names in {
            "rewards": ("rewards/chosen", "rewards/rejected", "rewards/margins"),
            "KL": ("kl", "kl/raw", "kl/policy_reference"),
        }.items()
    }
}
"""Custom scalars: rewards of both kinds and their margin in one chart, KL beside it."""


class TensorBoardReport(Callback):
    """Adds to a :class:`TensorBoardLogger`; does nothing with other loggers."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for writer in _writers(trainer):
            writer.add_custom_scalars(LAYOUT)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, Objective) or pl_module.labelled_rewards is None:
            return
        rewards, labels = pl_module.labelled_rewards
        for writer in _writers(trainer):
            for name, kind in (("desirable", labels), ("undesirable", ~labels)):
                if kind.any():
                    writer.add_histogram(f"val/rewards/{name}", rewards[kind], trainer.global_step)


def log_text(trainer: pl.Trainer, tag: str, texts: list[str]) -> None:
    """Show texts, one below the other, at the current step."""
    for writer in _writers(trainer):
        writer.add_text(tag, "\n\n---\n\n".join(texts), trainer.global_step)


def log_hparams(trainer: pl.Trainer, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Keep the run's parameters with its final metrics, so that runs can be compared."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(params), {f"final/{name}": value for name, value in metrics.items()})
            logger.save()


def truncate_events_after(folder: Path, step: int, *, validated: bool) -> None:
    """Take events behind ``step`` out of the folder's files, those of its own validation too unless ``validated``, and
    those of the run's end.

    A file that was cut off in the middle of an event keeps those before it.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    for path in sorted(folder.glob("events.out.tfevents.*")):
        records = list(RawEventFileLoader(str(path)).Load())
        kept = []
        for record in records:
            event = Event.FromString(record)
            if not _of(event, "final/") and (
                event.step < step or (event.step == step and (validated or not _of(event, "val/", "samples")))
            ):
                kept.append(record)
        if len(kept) == len(records):
            continue
        part = path.with_name(f".{path.name}.part")
        with part.open("wb") as stream:
            writer = RecordWriter(stream)
            for record in kept:
                writer.write(record)
        part.replace(path)


def _of(event: Any, *prefixes: str) -> bool:
    return any(value.tag.startswith(prefixes) for value in event.summary.value)


def _writers(trainer: pl.Trainer) -> list[Any]:
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
