"""Measurements of optimizer steps, which stay on the device until they are read."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halos.data.batches.batch import Batch
from halos.metrics import LabelledRewards, Mean, StepAverages
from halos.processes.collectives import full_tensor


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step that has ended.

    Attributes:
        number: counted from 1.
        ids: this rank's examples.
        norm: the norm of the gradient before clipping, a scalar on the device.
        lr: the learning rate.
    """

    number: int
    ids: list[str]
    norm: Tensor
    lr: float


class Steps(nn.Module):
    """The optimizer steps since the last :meth:`read`: their metrics, and the time that they took without pauses.

    Attributes:
        averages: the metrics of these steps.
        rewards: the rewards and labels of the newest step only.
        unread: these steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.averages, self.rewards = StepAverages(), LabelledRewards()
        self.unread: list[Step] = []
        self._ids: list[str] = []
        self._examples = self._tokens = 0
        self._seconds = 0.0
        self._since: float | None = None

    def begin(self) -> None:
        """Start the clock unless it is running."""
        self._since = self._since or time.perf_counter()

    def pause(self) -> None:
        """Stop the clock until :meth:`begin`."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
        self._since = None

    def add(
        self, batch: Batch, metrics: Mapping[str, Mean], rewards: tuple[Tensor, Tensor, Tensor | None] | None
    ) -> None:
        """Add a micro-batch to the current step; ``rewards``: :func:`labelled` ones, if the loss implies any."""
        self.averages.update(metrics)
        if not self._ids:  # the first micro-batch of the step
            self.rewards.reset()
        if rewards is not None:
            self.rewards.update(*rewards)
        self._ids += batch.ids
        self._examples += len(batch)
        self._tokens += batch.total_tokens

    def end(self, number: int, norm: Tensor, lr: float) -> Step:
        """End the current step: the next micro-batch belongs to a new one. All ranks must call this together."""
        step = Step(number, self._ids, full_tensor(norm), lr)
        self.unread.append(step)
        self._ids = []
        self.averages.end_step()
        return step

    def read(self, ranks: int) -> list[tuple[Step, dict[str, float]]]:
        """Return the steps since the last call, with their metrics over all ranks. All ranks must call this together.

        This is where the host waits for the device. The metrics of the last step include the mean speed of all these
        steps.
        """
        steps, self.unread = self.unread, []
        measured = [complete(means, self.averages.names) for means in self.averages.compute()]
        self.averages.reset()
        norms = torch.stack([step.norm for step in steps]).tolist()
        for step, metrics, norm in zip(steps, measured, norms, strict=True):
            metrics |= {"grad_norm": norm, "lr": step.lr}
        measured[-1] |= self._speed(ranks)
        return list(zip(steps, measured, strict=True))

    def _speed(self, ranks: int) -> dict[str, float]:
        self.pause()
        seconds, self._seconds = self._seconds, 0.0
        counts = {"examples_per_second": self._examples, "tokens_per_second": self._tokens}
        self._examples = self._tokens = 0
        self.begin()
        return {name: count * ranks / seconds for name, count in counts.items() if seconds > 0}


def complete(metrics: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """Add the metrics that follow from others: the loss, which is the sum of its terms, and the reward margin.

    Args:
        metrics: the metrics; those without a value are left out.
        names: the names of all metrics.
    """
    terms = [name for name in names if name.startswith("loss/")]
    metrics["loss"] = math.fsum(metrics[name] for name in terms if name in metrics)
    if len(terms) == 1:  # a single term is the loss itself
        metrics.pop(terms[0], None)
    if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics
