"""One epoch by each contestant, measured alike: seconds of the steps, memory, tokens fed to the model, losses.

Loading models is nobody's time. Optimizer steps, batching and logging are everybody's, and so is the reference: ours
is computed before the first step, the others' in every step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks import liger_side, plain, trl_side
from benchmarks.flops import Shape, needs
from benchmarks.job import Job, config
from halos.commands.assembly import Run, assemble
from halos.data.rows.token_rows import Row
from halos.training.record import peak_rss_mb


def train(job: Job, folder: Path) -> dict[str, Any]:
    """Steps of the job's contestant on the rows and in the order of ours."""
    run = assemble(config(job, folder))
    steps = planned(run)
    before = rss_mb("VmRSS")
    contest = {"ours": _ours, "plain": _plain, "liger": _plain}.get(job.who, _trl)
    others = others_seconds()
    with counted_tokens() as tokens:
        found = contest(job, folder, run, steps)
    objective = run.objective
    needed = needs(steps, mismatched=objective.needs.mismatched, reference=objective.needs.reference)
    return {
        "losses": found.losses,
        "seconds": found.seconds + found.reference_seconds,
        "reference_seconds": found.reference_seconds,
        "cpu_seconds": found.cpu_seconds,
        "examples": sum(map(len, steps)),
        "tokens": sum(tokens),
        "needed_tokens": needed.tokens,
        "operations": needed.operations(Shape.of(found.model)),
        "shape": asdict(Shape.of(found.model)),
        "parameters": sum(p.numel() for p in found.model.parameters()),
        "others_seconds": others_seconds() - others,
        "before_mb": before,
        "peak_mb": rss_mb("VmHWM"),
    }


class Found(NamedTuple):
    """The model, the losses, the seconds of the steps and of a separate reference pass, the CPU seconds of both."""

    model: Any
    losses: list[float]
    seconds: float
    reference_seconds: float
    cpu_seconds: float


Steps = list[list[Row]]


def planned(run: Run) -> Steps:
    """The rows of each step, in our order."""
    rows = run.data.rows["train"].table
    return [[rows[i] for i in micro.rows] for micro in run.data.order()]


def _ours(job: Job, folder: Path, run: Run, steps: Steps) -> Found:
    run.folder.open(OmegaConf.to_yaml(run.cfg, resolve=True), fresh=True)
    clock = _Clock()
    run.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
    cpu = time.process_time()
    run.trainer.fit(run.objective, datamodule=run.data)
    cpu = clock.end - cpu
    backbone = run.objective.trained
    losses = [loss for loss in run.record.train_loss if loss is not None]  # no step is skipped
    return Found(backbone.policy, losses, run.record.seconds, backbone.reference_seconds, cpu)


class _Clock(Callback):
    """CPU seconds at the end of the last step: the checkpoint that follows is nobody's time."""

    end = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        self.end = time.process_time()


def _plain(job: Job, folder: Path, run: Run, steps: Steps) -> Found:
    policy, reference = run.model.spec.load(), run.model.spec.load().eval()
    start, cpu = time.perf_counter(), time.process_time()
    compute = (plain if job.who == "plain" else liger_side).loss_of(job.loss)
    losses = plain.train(policy, reference, steps, compute, lr=job.lr, precision=job.precision)
    return Found(policy, losses, time.perf_counter() - start, 0.0, time.process_time() - cpu)


def _trl(job: Job, folder: Path, run: Run, steps: Steps) -> Found:
    torch.manual_seed(job.seed)
    with trl_side.patched(job.who):
        made = trl_side.trainer(
            job.loss,
            [row for rows in steps for row in rows],
            model=run.model.spec.load(),
            tokenizer=run.tokens.tokenizer,
            folder=folder / "trl",
            bf16=job.precision == "bf16-mixed",
            per_device_train_batch_size=job.batch_size,
            learning_rate=job.lr,
            max_length=job.max_length,
            seed=job.seed,
        )
        if job.who == "trl_best":
            trl_side.use_our_products(made)
        cpu = time.process_time()
        losses, seconds = trl_side.train(made)
        cpu = time.process_time() - cpu
    return Found(made.model, losses, seconds, 0.0, cpu)


@contextmanager
def counted_tokens() -> Iterator[list[int]]:
    """Within, tokens that any model reads are counted, whoever calls it."""
    found: list[int] = []
    original = nn.Embedding.forward

    def forward(self: nn.Embedding, ids: Tensor) -> Tensor:
        found.append(ids.numel())
        return original(self, ids)

    nn.Embedding.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        nn.Embedding.forward = original  # type: ignore[method-assign]


def others_seconds() -> float:
    """CPU seconds that other processes have used so far, 0 where the system does not list them (not Linux)."""
    file = Path("/proc/stat")
    if not file.exists():
        return 0.0
    user, nice, system, _, _, irq, soft_irq, *_ = map(int, file.read_text().split()[1:9])
    return (user + nice + system + irq + soft_irq) / os.sysconf("SC_CLK_TCK") - time.process_time()


def rss_mb(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (the most so far) of this process, in MiB.

    Linux's own numbers begin with the program; the peak that ``getrusage`` tells begins with the parent's size.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_rss_mb()
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
