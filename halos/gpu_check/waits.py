"""Between two logged steps the host waits for nothing that the device computes; and how many kernels a step has."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from halos.data.module import PreferenceDataModule
from halos.gpu_check.part import Numbers, Setting, expect
from halos.objectives import DPO, KTO, SFT, Objective
from halos.policy.backbone import Backbone
from halos.testing.device_work import DeviceWork, watched
from halos.toy import ToySource
from halos.toy.model import REFERENCE_DIR

STEPS, LOGGED = 8, 4
"""Steps of a run, and every which one is logged."""
READ_ON_HOST = "lightning/fabric/utilities/apply_func.py"
"""Lightning's reading of a progress bar's metrics, which are in the host's memory."""


def waits(setting: Setting) -> Numbers:
    """SFT, DPO and KTO for a few steps each."""
    numbers: dict[str, float] = {}
    for kind in (SFT, DPO, KTO):
        found = _on_gpu(kind, setting) if setting.on_gpu else _on_cpu(kind, setting)
        expect(not found, f"no wait in {kind.__name__}", "; ".join(f"{line} ({n} ×)" for line, n in found.items()))
        numbers[f"waits, {kind.__name__}"] = found.total()
    return numbers


def launches(setting: Setting) -> Numbers:
    """Kernels of a step of KTO on the toy model of two layers."""
    if not setting.on_gpu:
        counter = _Counted()
        with watched() as counter.work:
            _fit(KTO, setting, counter)
        return {"operations in a step": counter.kernels[-1]}
    profiler = torch.profiler.profile()  # of the CPU, which launches, and of CUDA
    _fit(KTO, setting, _Profiled(profiler))
    kernels = sum(event.name.startswith("cudaLaunchKernel") for event in profiler.events() or ())
    return {"kernels in a step": kernels}


def _on_cpu(kind: type[Objective], setting: Setting) -> Counter[str]:
    counter = _Counted()
    with watched() as counter.work:
        _fit(kind, setting, counter)
    return counter.waits


def _on_gpu(kind: type[Objective], setting: Setting) -> Counter[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _fit(kind, setting, _Warned())
    synchronising = [w for w in caught if "synchroniz" in str(w.message)]
    return Counter(f"{w.filename}:{w.lineno}" for w in synchronising)


def _fit(kind: type[Objective], setting: Setting, callback: Callback) -> None:
    objective = kind(Backbone.from_pretrained(REFERENCE_DIR, reference="live", cpu_kernels=False))
    data = PreferenceDataModule(ToySource(size=64, val_size=4), batch_size=8, cache_dir=setting.folder / "cache")
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: dict[str, Any] = dict.fromkeys(quiet, False) | {"log_every_n_steps": LOGGED, "max_steps": STEPS}
    trainer = pl.Trainer(
        accelerator=setting.device,
        devices=1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        callbacks=[callback],
        **options,
    )
    trainer.fit(objective, datamodule=data)


def _watched_step(trainer: pl.Trainer) -> bool:
    # The first step tries out what the model can do.
    return trainer.global_step > 0 and (trainer.global_step + 1) % LOGGED != 0


class _Counted(Callback):
    def __init__(self) -> None:
        self.work = DeviceWork()
        self.waits: Counter[str] = Counter()
        self.kernels: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        self.watching = _watched_step(trainer)
        self.work.take()

    def on_train_batch_end(self, *_: object) -> None:
        work = self.work.take()
        if self.watching:
            self.waits.update(wait for wait in work.waits if READ_ON_HOST not in wait)
            self.kernels.append(work.kernels.total())


class _Warned(Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        # Until the next step begins: what Lightning does between two steps is watched too.
        torch.cuda.set_sync_debug_mode("warn" if _watched_step(trainer) else "default")

    def on_train_end(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


class _Profiled(Callback):
    def __init__(self, profiler: torch.profiler.profile) -> None:
        self.profiler = profiler

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == STEPS - 3:
            self.profiler.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == STEPS - 2:
            self.profiler.stop()
