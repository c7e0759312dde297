"""Optimizer steps as they are measured. What was measured stays on the device until somebody reads it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halos.data.batches.collate import Batch
from halos.metrics import Mean, StepAverages


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step that has ended: its number, this rank's examples, and the norm of its gradient."""

    number: int
    ids: list[str]
    norm: Tensor
    lr: float


class Steps(nn.Module):
    """The steps since the last reading, and how long they took; pauses do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.averages = StepAverages()
        self.unread: list[Step] = []
        self._ids: list[str] = []
        self._examples = self._tokens = 0
        self._seconds = 0.0
        self._since: float | None = None

    def begin(self) -> None:
        """Start the clock, unless it runs."""
        self._since = self._since or time.perf_counter()

    def pause(self) -> None:
        """Stop the clock until :meth:`begin`."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
        self._since = None

    def add(self, batch: Batch, metrics: Mapping[str, Mean]) -> None:
        """Take in a micro-batch of the step that has not ended."""
        self.averages.update(metrics)
        self._ids += batch.ids
        self._examples += len(batch)
        self._tokens += batch.total_tokens

    def end(self, number: int, norm: Tensor, lr: float) -> Step:
        """The step that ends here; the next micro-batch belongs to another."""
        step = Step(number, self._ids, norm, lr)
        self.unread.append(step)
        self._ids = []
        self.averages.end_step()
        return step

    def read(self, ranks: int) -> list[tuple[Step, dict[str, float]]]:
        """Each step since the last reading with its metrics, over all ranks, which call this together.

        Speed is that of all these steps, and stands with the last one.
        """
        steps, self.unread = self.unread, []
        found = [complete(means) for means in self.averages.compute()]
        self.averages.reset()
        norms = torch.stack([step.norm for step in steps]).tolist()
        for step, metrics, norm in zip(steps, found, norms, strict=True):
            metrics |= {"grad_norm": norm, "lr": step.lr}
        found[-1] |= self._speed(ranks)
        return list(zip(steps, found, strict=True))

    def _speed(self, ranks: int) -> dict[str, float]:
        self.pause()
        seconds, self._seconds = self._seconds, 0.0
        counts = {"examples_per_second": self._examples, "tokens_per_second": self._tokens}
        self._examples = self._tokens = 0
        self.begin()
        return {name: count * ranks / seconds for name, count in counts.items() if seconds > 0}


def complete(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics with those that follow from others: the whole loss, and the margin between rewards."""
    terms = [name for name in metrics if name.startswith("loss/")]
    metrics["loss"] = math.fsum(metrics[name] for name in terms)
    if len(terms) == 1:
        del metrics[terms[0]]
    if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics
