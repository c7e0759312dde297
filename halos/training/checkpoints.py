"""Checkpoints: written whole or not at all, found again after any interruption, and refused for another run.

    checkpoints/step_1000.ckpt · step_1500.ckpt · last.ckpt (a link to the newest)

A checkpoint is taken right behind an optimizer step, before the validation that may be due; a run that goes on from it
validates first. What the loggers have is flushed beforehand, so nothing up to the checkpoint's step is ever missing.
"""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from halos.checks import check_whole
from halos.processes import signals
from halos.processes.collectives import all_max
from halos.processes.errors import RunFailed
from halos.sharding.consolidate import check_sharded
from halos.training.record import RunRecord

log = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints kept: the newest, and the one before it in case the newest gets damaged."""
PART = ".part"
IDENTITY = "halos"
"""Where a checkpoint says which run it belongs to: {configuration key: value}."""


class LocalCheckpointIO(TorchCheckpointIO):
    """Writes to the place it is told, and to the disk; Lightning's own builds the file in memory and in $TMPDIR."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with Path(path).open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())


class Checkpoints(Checkpoint):
    """Saves every so many optimizer steps, at the end, and when a signal asks the run to end.

    Args:
        folder: where checkpoints go.
        every: optimizer steps between checkpoints.
        identity: what a run that goes on from here has to have in common with this one.
        record: knows what has been validated.
    """

    def __init__(self, folder: Path, *, every: int, identity: Mapping[str, Any], record: RunRecord) -> None:
        check_whole("checkpoint_every", every, 1)
        self.folder, self.every, self.identity, self.record = folder, every, identity, record
        self._step = 0

    def save(self, trainer: pl.Trainer) -> None:
        """Save the run as it stands; to be called on all ranks.

        Raises :class:`RunFailed` if the file cannot be written, and :class:`FloatingPointError` if a loss or gradient
        since the last one was not finite; earlier checkpoints are as they were.
        """
        self.record.take_losses(trainer)
        path = self.folder / f"step_{trainer.global_step}.ckpt"
        part = path.with_name(path.name + PART)
        try:
            if trainer.is_global_zero:
                _flush(trainer)
                self.folder.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(part)
            if trainer.is_global_zero:
                _put(part, path)
                _point(path.with_name("last.ckpt"), path)
                self._prune()
        except (OSError, RuntimeError) as error:
            reason = _cause(error)
            if reason is None:
                raise
            _remove(part)
            raise RunFailed(
                f"{path}: the checkpoint could not be written: {reason}; earlier ones are as they were, resume=auto "
                "goes on from the last"
            ) from error
        trainer.strategy.barrier()

    def finish(self, trainer: pl.Trainer) -> None:
        """Save the run behind its last step, unless it was stopped before that; from here on ranks no longer wait for
        each other at every step."""
        signals.defer(True)  # a run that went on from behind its last step has not begun to train
        if not trainer.should_stop:  # that checkpoint is there, and says that the run can go on
            self.save(trainer)
        (number,) = all_max([signals.received()], trainer.strategy.root_device)
        signals.defer(False)
        signals.stop(number)

    def _prune(self) -> None:
        found = sorted(self.folder.glob("step_*.ckpt"), key=_age)
        for path in found[:-KEPT]:
            _remove(path)

    # What Lightning calls

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning's own handlers talk to the other ranks from inside the handler, and hang when all are signalled.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[IDENTITY] = dict(self.identity)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._step = checkpoint["global_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validate_if_due(trainer)
        signals.defer(True)

    def _validate_if_due(self, trainer: pl.Trainer) -> None:
        # Lightning takes a validation that was due at the checkpoint for done.
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        if not self._step or self.record.validated_at == self._step or fetcher is None:
            return
        if trainer.enable_validation and loop._should_check_val_fx(fetcher):
            loop.val_loop.batch_progress.reset()  # it may have been saved in the middle of one
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._step:
            trainer.should_stop = False  # not within a step: trainer.max_time asks again behind it
            return
        self._step = step
        (number,) = all_max([signals.received()], pl_module.device)
        if number or trainer.should_stop or step % self.every == 0:
            self.save(trainer)
        signals.stop(number)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signals.defer(True)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        (number,) = all_max([signals.received()], pl_module.device)
        if number and trainer.state.fn == "fit":
            self.save(trainer)
        signals.stop(number)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signals.defer(trainer.state.fn == "fit")


def _flush(trainer: pl.Trainer) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()


def _put(part: Path, path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    part.replace(path)
    _sync(path.parent)


def _point(link: Path, path: Path) -> None:
    # The same file under a second name; a folder (of a sharded checkpoint) can only have a symbolic link.
    part = link.with_name(link.name + PART)
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:
        part.symlink_to(path.name)
    part.replace(link)
    part.unlink(missing_ok=True)  # renaming onto another name of the same file does nothing
    _sync(link.parent)


def _sync(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _age(path: Path) -> tuple[int, bool]:
    return path.stat().st_mtime_ns, path.name == "last.ckpt"


def _cause(error: BaseException | None) -> str | None:
    # torch.save wraps what the file system said, or hides it behind what its own clean-up met.
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        error = error.__cause__ or error.__context__
    return None


# Finding one to go on from


def clean(folder: Path) -> None:
    """Remove what an interrupted save has left."""
    for path in folder.glob("*.ckpt" + PART):
        _remove(path)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; None if there is no checkpoint at all. Damaged ones are passed over with a warning.

    Raises ``ValueError`` if all are damaged.
    """
    damaged: list[str] = []
    for path in sorted({*folder.glob("step_*.ckpt"), *folder.glob("last.ckpt")}, key=_age, reverse=True):
        try:
            found = whole(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        if damaged:
            log.warning("%s; going on from %s instead", "; ".join(damaged), path)
        return found
    if damaged:
        raise ValueError("; ".join(damaged))
    return None


def whole(path: Path) -> Path:
    """The path itself. Raises ``ValueError`` for a file that is cut off, altered or no checkpoint."""
    if path.is_dir():
        return check_sharded(path)
    # A checkpoint is a zip file with checksums, whose directory stands at its end: a cut-off one has none.
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError) as error:
        bad = str(error)
    if bad is not None:
        raise ValueError(
            f"resume: expected a checkpoint file, found {path}, which is damaged or something else ({bad})"
        )
    return path


def check_identity(path: Path, identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is in the checkpoint; raises ``ValueError`` with the keys that differ if it is another run's."""
    file = path / "meta.pt" if path.is_dir() else path
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        theirs: Mapping[str, Any] = saved[IDENTITY]
    except Exception as error:  # torch raises several kinds
        raise ValueError(f"resume: expected a checkpoint of this program, found {path}: {error!r}") from error
    told = [
        f"{key}: {theirs.get(key, 'none')!s} in the checkpoint, {identity.get(key, 'none')!s} now"
        for key in dict.fromkeys((*theirs, *identity))
        if theirs.get(key) != identity.get(key)
    ]
    if told:
        raise ValueError(f"resume: {path} belongs to another run ({'; '.join(told)})")
    found: Mapping[str, Any] = saved
    return found
