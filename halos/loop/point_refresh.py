"""When the reference points that need samples of the policy are refreshed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from halos.loop.reference_point import PolicyKL


class PointRefresh(Callback, ABC):
    """Refreshes every :class:`PolicyKL` of an objective before the first step, and again every ``steps`` steps."""

    def __init__(self) -> None:
        self._step: int | None = None

    @abstractmethod
    def measure(self, trainer: pl.Trainer, objective: Any) -> float:
        """Return KL(π_θ ‖ π_ref) at the current policy, the same number on all ranks, which call this together."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        # Called before each micro-batch; all micro-batches of an optimizer step see the same number.
        if (step := trainer.global_step) == self._step:
            return
        self._step = step
        due = [m for m in pl_module.modules() if isinstance(m, PolicyKL) and step % m.steps == 0]
        if due:
            kl = self.measure(trainer, pl_module)
            for point in due:
                point.refresh(kl)


def check_refreshed(trainer: pl.Trainer) -> None:
    """Raise ``ValueError`` if the Trainer has no callback that samples the policy."""
    if not any(isinstance(callback, PointRefresh) for callback in getattr(trainer, "callbacks", ())):
        expected = "expected a callback that samples the policy, found none"
        hint = "add halos.training.PolicyPoint() to the Trainer's callbacks, or use halos.train"
        raise ValueError(f"loss.reference_point=policy: {expected}; {hint}")
