"""Where the time of our steps goes: every operation by its cause, and what lies between operations.

Each batch of a real run is trained on several times in a row: first as in training, then by turns with every operation
measured and without. The passes without are what the measured parts have to add up to; what the first pass takes longer
is the price of sizes that the process has not met before.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from benchmarks.job import Job, config
from benchmarks.operation_costs import Costs, Watch, fault_seconds, overhead, page_faults
from benchmarks.roofline import Clock, clock_for, roofline
from halos.commands.assembly import Run, assemble
from halos.policy.backbone import Backbone
from halos.policy.kernels.layers import repeated_layers
from halos.policy.logprobs import chunked_head
from halos.policy.logprobs.attention import PackedAttention

PASSES = ("first", *("measured", "again") * 3)
"""The passes over each batch."""


class Measured(NamedTuple):
    """One pass over a batch."""

    seconds: float
    faults: int
    costs: Costs


def profile(job: Job, folder: Path) -> dict[str, Any]:
    """Seconds of the steps by cause, and the least that operations and bytes allow."""
    run = assemble(config(job, folder))
    run.folder.open(OmegaConf.to_yaml(run.cfg, resolve=True), fresh=True)
    clock = clock_for(job.threads)
    steps = Steps(clock)
    trainer: Any = run.trainer
    trainer.callbacks.append(steps)
    with _every_batch_again(run), staged(steps.stages, trainer):
        trainer.fit(run.objective, datamodule=run.data)
    policy = run.objective.trained.policy
    sizes = {size for p in policy.parameters() for size in p.shape}
    found, products = steps.found(), total(measured.costs for measured in steps.measured).products
    return found | {
        "threads": job.threads,
        "layers": len(repeated_layers(policy)),
        "overhead": overhead(clock),
        "fault_seconds": fault_seconds(clock),
        "roofline": roofline(job.precision, products, sizes, found["causes"], clock),
    }


class Steps(Callback):
    """Measures each step from the end of the one before, so that data, Lightning and logging are a part of it.

    Of a batch's passes of a kind the fastest counts, which other programs on the machine have disturbed least.
    """

    def __init__(self, clock: Clock) -> None:
        self.stages = ["rest"]
        self.seconds: dict[str, float] = defaultdict(float)
        self.measured: list[Measured] = []
        self._clock, self._watch = clock, Watch(clock, self.stages)
        self._passes = cycle(PASSES)
        self._tries: dict[str, list[Measured]] = defaultdict(list)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            step = optimizer.step

            def closure_apart(closure: Any = None, *, step: Any = step) -> Any:
                # Lightning runs the forward and the backward pass within the optimizer's step.
                return marked(self.stages, "optimizer", step)(marked(self.stages, "rest", closure))

            optimizer.step = closure_apart
        self._begin()

    def on_train_batch_end(self, *_: Any) -> None:
        seconds, faults = (self._clock() - self._start) / 1e9, page_faults() - self._faults
        if self._name == "measured":
            self._watch.__exit__(None, None, None)
        self._tries[self._name].append(Measured(seconds, faults, self._watch.take()))
        if sum(map(len, self._tries.values())) == len(PASSES):
            fastest = {name: min(tries, key=lambda found: found.seconds) for name, tries in self._tries.items()}
            for name, found in fastest.items():
                self.seconds[name] += found.seconds
            self.measured.append(fastest["measured"])
            self._tries.clear()
        self._begin()

    def _begin(self) -> None:
        self._name = next(self._passes)
        if self._name == "measured":
            self._watch.__enter__()
        self._start, self._faults = self._clock(), page_faults()

    def found(self) -> dict[str, Any]:
        """Means of a step."""
        share = 1 / len(self.measured)
        costs = total(found.costs for found in self.measured)
        return {
            "seconds": {name: share * seconds for name, seconds in self.seconds.items()},
            "faults": share * sum(found.faults for found in self.measured),
            "views": share * costs.views,
            "between": {stage: share * seconds for stage, seconds in costs.between.items()},
            "causes": {
                name: {part: share * value for part, value in asdict(cost).items()}
                for name, cost in costs.causes.items()
            },
            "names": {name: share * seconds for name, seconds in Counter(costs.names).most_common(40)},
        }


def total(all_costs: Iterable[Costs]) -> Costs:
    """The sums."""
    found = Costs()
    for costs in all_costs:
        for name, cost in costs.causes.items():
            summed = found.causes[name]
            for part, value in asdict(cost).items():
                setattr(summed, part, getattr(summed, part) + value)
        for stage, seconds in costs.between.items():
            found.between[stage] += seconds
        for name, seconds in costs.names.items():
            found.names[name] += seconds
        for product, operations in costs.products.items():
            found.products[product] += operations
        found.views += costs.views
    return found


def marked(stages: list[str], stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which puts its stage on the list while it runs."""

    def run(*args: Any, **options: Any) -> Any:
        stages.append(stage)
        try:
            return function(*args, **options)
        finally:
            stages.pop()

    return run


@contextmanager
def staged(stages: list[str], trainer: Any) -> Iterator[None]:
    """Within, the functions of a step are :func:`marked`."""
    head = chunked_head._ChunkedLogProbs
    norms = ("get_total_norm", "clip_grads_with_norm_", "clip_grad_norm_")
    with ExitStack() as stack:
        for owner, name, stage in (
            (Backbone, "logprobs", "forward"),
            (PackedAttention, "__call__", "attention"),
            (trainer.strategy, "backward", "backward"),
            *((torch.nn.utils, norm, "optimizer") for norm in norms),
        ):
            stack.enter_context(patch.object(owner, name, marked(stages, stage, getattr(owner, name))))
        for name in ("forward", "backward"):
            stack.enter_context(patch.object(head, name, staticmethod(marked(stages, "head", getattr(head, name)))))
        yield


@contextmanager
def _every_batch_again(run: Run) -> Iterator[None]:
    """Within, the run's loader yields every batch once for each of :data:`PASSES`."""
    data = run.data
    load = data.train_dataloader

    class Repeated:
        def __init__(self) -> None:
            self.loader = load()

        def __len__(self) -> int:
            return len(self.loader) * len(PASSES)

        def __iter__(self) -> Iterator[Any]:
            return (batch for batch in self.loader for _ in PASSES)

    steps = data.steps * len(PASSES)
    run.trainer.fit_loop.epoch_loop.max_steps = steps
    with patch.object(data, "train_dataloader", Repeated):
        yield
