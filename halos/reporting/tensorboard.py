"""TensorBoard's event files: what a run that resumes removes from them, and their writers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from halos.files import PART, atomic_file, remove
from halos.reporting.boards import FINAL

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

OF_VALIDATION = ("val/", "alignment/", "samples")
"""Beginnings of what a validation logs."""


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
    # and drop the validation of the same step, nor drop the metrics of the run's end.
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    def is_logged_again(event: Event) -> bool:
        tags = [value.tag for value in event.summary.value]
        if event.step > step or any(tag.startswith(FINAL) for tag in tags):
            return True
        of_validation = any(tag.startswith(OF_VALIDATION) and not tag.startswith("alignment/train/") for tag in tags)
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
