"""Where the time of one of our runs goes."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from benchmarks.job import Job, config
from halos.commands.assembly import Run, assemble
from halos.data.batches.collate import Batches
from halos.policy.backbone import Backbone

OPERATORS = (
    ("LM head", r"ChunkedLogProbs|HeadFunction"),
    ("attention", r"(?i)attention|attend"),
    ("optimizer", r"_fused_adam|_foreach_"),
    ("matrix products", r"aten::(addmm|mm|bmm|linear|matmul)$|AddmmBackward|MmBackward|LinearBackward"),
)
"""Kinds of operators by a pattern of their names; what fits none is elementwise work, copies and everything else."""

WATCHED: tuple[tuple[Any, str, str], ...] = (
    (Backbone, "logprobs", "forward"),
    (Batches, "__getitem__", "data"),
    *((torch.nn.utils, name, "optimizer") for name in ("get_total_norm", "clip_grads_with_norm_", "clip_grad_norm_")),
)
"""Functions by the stage that they are."""


class Stopwatch:
    """Seconds spent in wrapped functions; of nested ones, in each alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                took = time.perf_counter() - start
                self.seconds[name] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return timed


class WatchOptimizer(Callback):
    """Watches from the first step on: the reference's pass before it is none of the steps' time."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.watch.seconds.clear()
        for optimizer in trainer.optimizers:
            step = optimizer.step

            def timed(closure: Any = None, *, step: Any = step) -> Any:
                # What Lightning does within the closure is not the optimizer's time.
                return self.watch.wrap("optimizer", step)(self.watch.wrap("rest", closure))

            optimizer.step = timed


def _assemble(job: Job, folder: Path) -> Run:
    run = assemble(config(job, folder))
    run.folder.open(OmegaConf.to_yaml(run.cfg, resolve=True), fresh=True)
    return run


def stages(job: Job, folder: Path) -> dict[str, Any]:
    """Seconds of the steps in the model with its head, forward and backward, in the optimizer (clipping included), in
    collating, and in the rest, which is Lightning, the loss, metrics and logging."""
    run = _assemble(job, folder)
    trainer: Any = run.trainer
    watch = Stopwatch()
    trainer.callbacks.append(WatchOptimizer(watch))
    trainer.strategy.backward = watch.wrap("backward", trainer.strategy.backward)
    with ExitStack() as stack:
        for owner, function, stage in WATCHED:
            watched = watch.wrap(stage, getattr(owner, function))
            stack.enter_context(patch.object(owner, function, watched))
        trainer.fit(run.objective, datamodule=run.data)
    return {"seconds": split_off_rest(watch.seconds, run.record.seconds)}


def split_off_rest(seconds: dict[str, float], total: float) -> dict[str, float]:
    """The measured stages, the rest of the total, and ``overhead``: data and rest as a share of all other stages."""
    found = {name: seconds[name] for name in ("forward", "backward", "optimizer", "data")}
    bare = found["forward"] + found["backward"] + found["optimizer"]
    found["rest"] = total - bare - found["data"]
    return found | {"overhead": (found["data"] + found["rest"]) / bare}


def operators(job: Job, folder: Path) -> dict[str, Any]:
    """Seconds of the steps' operators by kind; profiling costs some time itself."""
    run = _assemble(job, folder)
    trainer: Any = run.trainer
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    trainer.callbacks.append(_Profiled(profiler))
    trainer.fit(run.objective, datamodule=run.data)
    return {"seconds": by_kind(profiler.events() or ())}


class _Profiled(Callback):
    def __init__(self, profiler: Any) -> None:
        self.profiler = profiler

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.profiler.start()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.profiler.stop()


def by_kind(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of each kind of operator; an operator counts within the outermost one that has a kind."""
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        kind = kind_of(event.name)
        inside = event.cpu_parent
        while inside is not None and kind_of(inside.name) is None:
            inside = inside.cpu_parent
        if kind is not None and inside is None:
            seconds[kind] += event.cpu_time_total / 1e6
        elif kind is None and inside is None and event.name.startswith("aten::"):
            seconds["elementwise and other"] += event.self_cpu_time_total / 1e6
    return dict(seconds)


def kind_of(name: str) -> str | None:
    """The kind of an operator."""
    return next((kind for kind, pattern in OPERATORS if re.search(pattern, name)), None)
