"""The data report of a stream, written while training."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from halos.data.streaming.module import StreamingDataModule
from halos.reporting.data_report import write_report


class StreamReport(Callback):
    """Writes the data report of a stream with every checkpoint, because a stream is read during training."""

    def __init__(self, data: StreamingDataModule, folder: Path) -> None:
        self.data, self.folder = data, folder

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, object]
    ) -> None:
        # A signal may cause a checkpoint before anything is read from the stream.
        if self.data.take_account():
            write_report(self.data.prepared.intake, self.folder)
