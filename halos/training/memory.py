"""On CPUs, keeps freed memory with the process instead of returning it to the system."""

from __future__ import annotations

import ctypes
import sys

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

SETTINGS = {-4: 0, -1: -1}
"""Of glibc's malloc.h: M_MMAP_MAX = 0 (large blocks come from the heap), M_TRIM_THRESHOLD = -1 (it never shrinks)."""


class KeepFreedMemory(Callback):
    """Makes glibc reuse the memory of freed tensors.

    By default glibc returns every large block to the system at once, and the system clears each page of the next block,
    which takes twice as long as the arithmetic itself. Nothing is changed on accelerators, where PyTorch keeps freed
    memory by itself, or with other C libraries.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()


def keep_freed_memory() -> bool:
    """Set glibc to keep freed memory; returns whether it does."""
    # musl has no mallopt, and macOS another allocator.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(mallopt(*setting) for setting in SETTINGS.items())
