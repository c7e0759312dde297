"""Metrics as (sum, count) pairs: added up over micro-batches, all-reduced over ranks, then divided once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat


@dataclass(slots=True)
class Mean:
    """A mean that is not divided yet. For a loss term ``step_count`` is the count of the whole optimizer step."""

    total: Tensor
    count: Tensor | float
    step_count: float | None = None


def mean_where(values: Tensor, where: Tensor) -> Mean:
    """The mean of ``values`` over the places where ``where`` (same shape, bool) is true."""
    return Mean((values.detach() * where).sum(), where.sum())


class Averages(Metric):
    """Named means, kept as one [names, 2] tensor of (sum, count). A name that counted nothing is left out."""

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.add_state("sums", torch.zeros(0, 2), dist_reduce_fx="sum")

    def update(self, means: Mapping[str, Mean]) -> None:
        """Add one micro-batch. The names must be the same in each call, so that ranks and steps line up."""
        new = self._sums_of(means)
        self.sums = new if len(self.sums) == 0 else self.sums + new

    def compute(self) -> Any:
        """{name: sum / count} over everything since the last reset, on all ranks."""
        return self._divided(self.sums.tolist())

    def _sums_of(self, means: Mapping[str, Mean]) -> Tensor:
        if self.names and self.names != list(means):
            raise ValueError(f"expected the metrics {self.names}, found {list(means)}")
        self.names = list(means)
        device = self.sums.device
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        parts = [part for mean in means.values() for part in (mean.total, mean.count)]
        # A plain number must not become the default dtype: with precision=bf16-true that would round a count.
        made = partial(torch.full, (), dtype=dtype, device=device)
        whole = [part.detach().to(device, dtype) if isinstance(part, Tensor) else made(part) for part in parts]
        return torch.stack(whole).view(-1, 2)

    def _divided(self, sums: list[list[float]]) -> dict[str, float]:
        pairs = zip(self.names, sums, strict=True) if sums else ()
        return {name: total / count for name, (total, count) in pairs if count > 0}


class StepAverages(Averages):
    """The same for each of several optimizer steps, [steps, names, 2]: they wait on the device until they are read."""

    def __init__(self) -> None:
        super().__init__()
        self._within = False

    def update(self, means: Mapping[str, Mean]) -> None:
        """Add one micro-batch of the step that has not ended."""
        new = self._sums_of(means)
        if self._within:
            self.sums[-1] += new
        else:
            self.sums = torch.cat([self.sums.view(-1, *new.shape), new[None]])
        self._within = True

    def end_step(self) -> None:
        """What comes from now on belongs to the next step."""
        self._within = False

    def compute(self) -> list[dict[str, float]]:
        """{name: sum / count} of each step since the last reset, on all ranks, which are read all at once."""
        return [self._divided(step) for step in self.sums.tolist()]

    def reset(self) -> None:
        """Forget all steps."""
        super().reset()
        self._within = False


class LabelledRewards(Metric):
    """Rewards of completions with their labels, gathered from all ranks, for AUC and histograms."""

    full_state_update = False
    rewards: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rewards", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, rewards: Tensor, labels: Tensor) -> None:
        """Add rewards [n] and whether each belongs to a desirable completion [n]."""
        self.rewards.append(rewards.detach().float().flatten())
        self.labels.append(labels.detach().flatten())

    def compute(self) -> tuple[Tensor, Tensor]:
        """(rewards, labels) of everything since the last reset, on all ranks."""
        return dim_zero_cat(self.rewards), dim_zero_cat(self.labels)


TIE = 1e-4
"""Rewards no further apart than this are equal: rounding alone, between a policy and the reference that it still is,
makes differences of 1e-5."""


def auc(rewards: Tensor, labels: Tensor) -> float | None:
    """P(reward of a desirable completion > reward of an undesirable one), ties counting half; None for one class.

    Ranks go in, not rewards: the library takes values outside [0, 1] for logits, and its sigmoid makes ties of large
    ones.
    """
    if labels.all() or not labels.any():
        return None
    distinct, ranks = torch.unique((rewards.double() / TIE).round(), return_inverse=True)
    return float(binary_auroc(ranks.double() / len(distinct), labels.long()))
