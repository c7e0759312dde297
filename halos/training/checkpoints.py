"""Checkpoints: never incomplete, usable after any interruption, and refused by any other run.

    checkpoints/step_500.ckpt · step_1000.ckpt · step_1500.ckpt · last.ckpt and best.ckpt (links to two of them)

A checkpoint is written directly after an optimizer step, before the validation that may be due at that step; a run that
resumes from it validates first. Loggers are flushed before it, so their files reach at least as far.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from halos.checks import check_whole
from halos.files import PART, link_atomically, move_into_place, remove
from halos.processes import signals
from halos.processes.collectives import all_max
from halos.processes.errors import RunFailed
from halos.reporting.tensorboard import writers
from halos.training.checkpoint_files import BEST, IDENTITY, LAST, by_step, step_of
from halos.training.record import RunRecord, State

log = logging.getLogger(__name__)

LOWER = ("val/loss", "val/kl")
"""Beginnings of the names of metrics whose lowest value is the best; for all others it is the highest."""


class LocalCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its file; Lightning's own builds it in memory, then in $TMPDIR."""

    def save_checkpoint(self, checkpoint: State, path: str | Path, storage_options: object | None = None) -> None:
        # Opened by Python: when torch opens the path itself, it reports a full disk as a RuntimeError without a cause.
        # A link with this name, which others may have put there, is not written through.
        with Path(path).open("xb") as stream:
            torch.save(checkpoint, stream)


class Checkpoints(Checkpoint):
    """Saves a checkpoint every N optimizer steps, at the end of the run, and when a signal ends the run.

    With a metric, it also saves before each validation, and keeps the checkpoint with the best validation.

    Args:
        folder: the folder of checkpoints.
        every: optimizer steps between checkpoints.
        keep: the number of newest checkpoints to keep, at least 1; with 2, a run survives damage to the newest. None:
            all.
        best: a validation metric, such as ``val/rewards/accuracies``. The best value is the lowest one for
            ``val/loss…`` and ``val/kl…``, and the highest for others. None: keep no checkpoint for its validation.
        identity: the settings that a run must share with this one to resume from its checkpoints; read when a
            checkpoint is written.
        record: what the run has validated and logged so far.

    Raises:
        ValueError: a number or a metric is invalid.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        keep: int | None = 2,
        best: str | None = None,
        identity: Mapping[str, object],
        record: RunRecord,
    ) -> None:
        check_whole("checkpoint.every", every, 1)
        check_whole("checkpoint.keep", keep, 1, null=True)
        if best is not None and not str(best).startswith("val/"):
            raise ValueError(f"checkpoint.best: expected a metric of validation, such as val/loss, found {best!r}")
        self.folder, self.every, self.keep, self.metric = folder, every, keep, best
        self.identity, self.record = identity, record
        self.best: tuple[int, float] | None = None
        """The step of the best validation so far, and its value."""
        self._step = 0
        self._saved: int | None = None

    @property
    def best_path(self) -> Path | None:
        """The checkpoint with the best validation so far."""
        return None if self.best is None else self._path(self.best[0])

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}.ckpt"

    def save(self, trainer: pl.Trainer) -> None:
        """Save the current state of the run. All ranks call this together.

        Raises:
            RunFailed: the file cannot be written; earlier checkpoints are left as they were.
            FloatingPointError: a loss or gradient since the last checkpoint was not finite.
        """
        # Losses are checked first: a checkpoint with weights from a non-finite step would replace a good one.
        self.record.take_losses(trainer)
        path = self._path(trainer.global_step)
        part = path.with_name(path.name + PART)
        try:
            if trainer.is_global_zero:
                for writer in writers(trainer):
                    writer.flush()
                self.folder.mkdir(parents=True, exist_ok=True)
                remove(part)
            trainer.save_checkpoint(part)
            if trainer.is_global_zero:
                move_into_place(part, path)
                link_atomically(path.with_name(LAST), path)
                # Pruned last, so that at least one complete checkpoint exists at every moment.
                # Checkpoints of later steps were written before the run was resumed at an earlier step, or are damaged.
                others = [old for old in by_step(self.folder) if old != path]
                earlier = [old for old in others if step_of(old) < step_of(path)]
                retained = earlier if self.keep is None else earlier[: self.keep - 1]
                for old in set(others) - {*retained, self.best_path}:
                    remove(old)
        except (OSError, RuntimeError) as error:
            if (reason := _system_error(error)) is None:
                raise
            remove(part)
            hint = "earlier ones are as they were, resume=auto goes on from the last"
            raise RunFailed(f"{path}: the checkpoint could not be written: {reason}; {hint}") from error
        self._saved = trainer.global_step
        trainer.strategy.barrier()

    def finish(self, trainer: pl.Trainer) -> None:
        """Save the run after its last step, unless it was stopped early, and end it if a signal was received.

        From here on ranks no longer wait for each other at every step, so signals are not deferred any more.
        """
        # A run that resumes after its last step does not train, so it has not deferred signals yet.
        signals.defer(True)
        if self._saved != trainer.global_step:
            self.save(trainer)
        (number,) = all_max([signals.received()])
        signals.defer(False)
        signals.stop(number)

    # The hooks that Lightning calls

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning's own signal handlers call collectives from inside the handler. When all ranks are signalled, each
        # may be in another collective at that moment, and all hang. Our handlers only record the signal
        # (halos.processes.signals).
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: State) -> None:
        checkpoint[IDENTITY] = dict(self.identity)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: State) -> None:
        self._step = checkpoint["global_step"]

    def state_dict(self) -> State:
        return {"best": self.best}

    def load_state_dict(self, state: State) -> None:
        self.best = state["best"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Resumed into another folder, or from a checkpoint after which a better one has replaced this one.
        if self.best is not None and not self._exists(trainer, self.best[0]):
            self.best = None
        self._validate_if_due(trainer)
        trainer.should_stop = trainer.should_stop or early_stop(trainer) is not None
        signals.defer(True)

    def _exists(self, trainer: pl.Trainer, step: int) -> bool:
        # The first process writes, and the other machines of a run may not see its folder.
        return bool(trainer.strategy.broadcast(self._path(step).exists()))

    def _validate_if_due(self, trainer: pl.Trainer) -> None:
        # A checkpoint is written before the validation of its step. When Lightning restarts its loop there, it moves
        # the counters to the end of that validation as if it had been done (`_TrainingEpochLoop.advance`). So the
        # validation loop is run by hand, as in `on_advance_end`.
        epoch_loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        if not self._step or self.record.validated_at == self._step or fetcher is None:
            return
        if trainer.enable_validation and epoch_loop._should_check_val_fx(fetcher):
            # The checkpoint may have been written in the middle of a validation (on_validation_batch_end): its
            # progress was stored too, and the loop would skip the batches that it counts as done.
            epoch_loop.val_loop.batch_progress.reset()
            trainer.validating = True  # else hooks and metrics are those of training
            epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        step = trainer.global_step
        if step == self._step:
            # The batch has not ended an optimizer step (trainer.accumulate_grad_batches). trainer.max_time may ask to
            # stop here, but gradients are in no checkpoint; it asks again after the next batch.
            trainer.should_stop = False
            return
        self._step = step
        # Ranks receive a signal at different moments. They agree here on the highest number, so that all of them save
        # and stop after the same step.
        (number,) = all_max([signals.received()])
        if number or trainer.should_stop or step % self.every == 0 or self._validates_to_compare(trainer):
            self.save(trainer)
        signals.stop(number)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signals.defer(True)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        (number,) = all_max([signals.received()])
        if number and trainer.state.fn == "fit":  # before and after training there is nothing new to save
            self.save(trainer)
        signals.stop(number)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signals.defer(trainer.state.fn == "fit")
        step, metric = trainer.global_step, self.metric
        value = None if metric is None else self.record.val_metrics.get(metric.removeprefix("val/"))
        if metric is None or value is None or not math.isfinite(value):  # replies are not sampled every time
            return
        sign = -1 if metric.startswith(LOWER) else 1
        # Step 0 is the model that training starts from, and has no checkpoint.
        if (self.best is None or sign * value > sign * self.best[1]) and self._exists(trainer, step):
            self.best = (step, value)
            if trainer.is_global_zero:
                link_atomically(self.folder / BEST, self._path(step))

    def _validates_to_compare(self, trainer: pl.Trainer) -> bool:
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        return self.metric is not None and fetcher is not None and loop._should_check_val_fx(fetcher)


def early_stop(trainer: pl.Trainer) -> str | None:
    """Return the reason why early stopping has ended the run; None if it has not."""
    callbacks = trainer.early_stopping_callbacks
    return next((reason for callback in callbacks if (reason := callback.stopping_reason_message)), None)


def _system_error(error: BaseException | None) -> str | None:
    # torch.save raises a RuntimeError from the file system's error, or from an error of its own clean-up after it.
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        error = error.__cause__ or error.__context__
    return None
