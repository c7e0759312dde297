"""The progress of a run in one line: optimizer steps, passes over the data, time left, loss, margin and KL."""

from __future__ import annotations

import time
from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.live import Live
from rich.text import Text

from halos.data.module import PreferenceDataModule
from halos.terminal import Pace, console, rewritable

WIDTH = 80
"""The maximum width of a line, in columns."""
BAR = (10, 24)
"""The smallest and the largest width of the bar that a terminal shows if the line leaves room for it."""
REWRITTEN = 0.1
"""Seconds between two updates of a terminal's line."""
TRAINING = {"train/loss": "loss", "train/rewards/margins": "margin", "val/kl": "KL"}
"""Metrics of a line about training, and their short names; the KL is that of the last validation that sampled."""
VALIDATION = {
    "val/loss": "loss",
    "val/rewards/margins": "margin",
    "val/rewards/accuracies": "accuracy",
    "val/rewards/auc": "AUC",
    "val/kl": "KL",
}
"""Metrics of a line about a validation."""


class Progress(ProgressBar):
    """Shows progress in one line, which a terminal rewrites and a log file gets at a lower rate.

    Args:
        data: provides the number of steps of the run and of its passes over the data.
    """

    def __init__(self, data: PreferenceDataModule) -> None:
        super().__init__()
        self.data = data
        self._enabled = True
        self._step = 0
        self._pace: Pace | None = None
        self._validated, self._validation = 0, Pace(0)
        self._values: dict[str, float] = {}
        self._live: Live | None = None
        self._rewritten_at = 0.0

    def disable(self) -> None:
        """Show nothing; Lightning calls it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the line again."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        step, steps = trainer.global_step, self.data.steps
        if step == self._step:  # a micro-batch that has not ended a step
            return
        self._step = step
        # Metrics are new where a step was logged.
        if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set when it is built
            self._values |= _values(trainer, TRAINING)
        first = self._pace is None
        # The clock starts after the first step, which may compile kernels.
        self._pace = self._pace or Pace(steps, step)
        left = self._pace.left(step) if step < steps else ""
        line = progress_line(step, steps, self._pass(), left, self._values)
        self._show(line, step / steps, due=self._pace.due(step) or first)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated, self._validation = 0, Pace(int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self._validated += 1
        done, total = self._validated, self._validation.total
        if done < total:
            line = f"validation {done}/{total}  {self._validation.left(done)} left"
            self._show(line, done / total, due=self._validation.due(done))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._enabled:
            shown = _numbers(_values(trainer, VALIDATION))
            console.print(fitted([f"validation at step {trainer.global_step}", *shown], WIDTH), soft_wrap=True)
        if trainer.state.fn == "validate":
            self._end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end()

    def _pass(self) -> tuple[int, int] | None:
        # A step counts for the pass in which it begins: the last step of a run is filled up from a further pass.
        begun = [self.data.passes(step - 1) for step in (self._step, self.data.steps)]
        # Rounded first, as a quotient may be off by a rounding error.
        now, last = (None if passes is None else int(round(passes, 6)) + 1 for passes in begun)
        return None if now is None or last is None else (now, last)

    def _show(self, line: str, share: float, *, due: bool) -> None:
        if not self._enabled:
            return
        if share < 1 and rewritable():
            self._rewrite(line, share)
        elif due:
            console.print(line, soft_wrap=True)

    def _rewrite(self, line: str, share: float) -> None:
        now = time.monotonic()
        if now - self._rewritten_at < REWRITTEN:
            return
        self._rewritten_at = now
        if self._live is None:
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()
        text = with_bar(line, share, console.width, plain=console.options.ascii_only)
        self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def _end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def progress_line(step: int, steps: int, passes: tuple[int, int] | None, left: str, values: Mapping[str, float]) -> str:
    """Return the line about a step of training.

    Args:
        step: the optimizer step that has ended.
        steps: the number of steps of the run.
        passes: the number of the current pass over the data, and that of all passes; None for a stream.
        left: the time that the rest will take.
        values: metrics by their short names. The last ones are left out if the line would be too long.
    """
    parts = [f"step {step}/{steps}"]
    if passes is not None:
        parts.append(f"pass {passes[0]}/{passes[1]}")
    if left:
        parts.append(f"{left} left")
    return fitted([*parts, *_numbers(values)], WIDTH)


def fitted(parts: list[str], width: int) -> str:
    """Join parts to a line, leaving out the last ones if it would be longer than ``width``."""
    while len(parts) > 1 and len("  ".join(parts)) > width:
        parts = parts[:-1]
    return "  ".join(parts)


def with_bar(line: str, share: float, width: int, *, plain: bool) -> str:
    """Put a bar before the line where ``width`` leaves room for it.

    Args:
        line: the line.
        share: the share of the bar that is filled.
        width: the width of the terminal in columns.
        plain: whether the terminal's encoding lacks the bar's characters.
    """
    least, most = BAR
    columns = min(most, width - len(line) - 1)
    if plain or columns < least:
        return line
    filled = int(share * columns)
    return f"{'━' * filled}{'╌' * (columns - filled)} {line}"


def _numbers(values: Mapping[str, float]) -> list[str]:
    # Rounding errors are shown as 0; adding 0 makes a zero of -0.
    return [f"{name} {float(f'{round(value, 6):.3g}') + 0.0:g}" for name, value in values.items()]


def _values(trainer: pl.Trainer, names: Mapping[str, str]) -> dict[str, float]:
    metrics = trainer.callback_metrics
    return {short: float(metrics[name]) for name, short in names.items() if name in metrics}
