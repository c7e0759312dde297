"""Freed memory stays with the process on CPUs."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

SETTINGS = {-4: 0, -1: -1}  # of glibc's malloc.h: M_MMAP_MAX to none, M_TRIM_THRESHOLD to never


class KeepFreedMemory(Callback):
    """Has glibc reuse the memory of tensors that are gone instead of returning it to the system.

    It would return every large tensor at once, and the system clears each page of the next one: twice the time of the
    arithmetic itself. On accelerators, where PyTorch keeps freed memory in the same way, and with other C libraries
    nothing is changed.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()


def keep_freed_memory() -> bool:
    """Whether glibc keeps freed memory from now on."""
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(mallopt(*setting) for setting in SETTINGS.items())
