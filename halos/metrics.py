"""Metrics as (sum, count) pairs: added up over micro-batches, all-reduced over ranks, then divided once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


@dataclass(slots=True)
class Mean:
    """A mean before its division, so that micro-batches and ranks can be added up first.

    Attributes:
        total: the sum of the values.
        count: how many values there are, or the sum of their weights.
        step_count: for a loss term, the count of the whole optimizer step.
    """

    total: Tensor
    count: Tensor | float
    step_count: float | None = None

    @property
    def of_step(self) -> Tensor:
        """The part of these values in the mean over the whole optimizer step; 0 if the step has none.

        A step of a mixture may have no example for one of its losses.
        """
        if self.step_count is None:
            raise ValueError("expected the count of the whole step, found none")
        return self.total / self.step_count if self.step_count else self.total

    def __mul__(self, factor: float | Tensor) -> Mean:
        """Scale the mean, as the weight of a term of a loss does."""
        return Mean(self.total * factor, self.count, self.step_count)

    __rmul__ = __mul__


def mean_where(values: Tensor, where: Tensor, weights: Tensor | None = None) -> Mean:
    """Return the mean of values [B, …] over the places where ``where`` (same shape, bool) is true, without gradient.

    Args:
        values: the values.
        where: the places that count.
        weights: [B] how much the places of each row count; None: all the same.
    """
    counts = where if weights is None else where * weights.view(-1, *[1] * (where.ndim - 1))
    return Mean((values.detach() * counts).sum(), counts.sum())


class Averages(Metric):
    """Named means, kept as one [names, 2] tensor of (sum, count). A name whose count is 0 is left out of the result."""

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

    def compute(self) -> dict[str, float]:
        """Return {name: sum / count} over everything since the last reset, on all ranks."""
        return self._divided(self.sums.tolist())

    def _sums_of(self, means: Mapping[str, Mean]) -> Tensor:
        if self.names and self.names != list(means):
            raise ValueError(f"expected the metrics {self.names}, found {list(means)}")
        self.names = list(means)
        device = self.sums.device
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64

        def on_device(number: Tensor | float) -> Tensor:
            if isinstance(number, Tensor):
                return number.detach().to(device, dtype)
            # full() is a kernel; the host would wait for a copy, as torch.tensor(number, device=…) makes one. With its
            # dtype, as in the default one, bfloat16 with precision=bf16-true, a count would be rounded.
            return torch.full((), number, dtype=dtype, device=device)

        return torch.stack([on_device(n) for mean in means.values() for n in (mean.total, mean.count)]).view(-1, 2)

    def _divided(self, sums: list[list[float]]) -> dict[str, float]:
        pairs = zip(self.names, sums, strict=True) if sums else ()
        return {name: total / count for name, (total, count) in pairs if count > 0}


class StepAverages(Averages):
    """Named means of each of several optimizer steps, kept as one [steps, names, 2] tensor.

    The sums stay on the device until they are read: reading every step would make the host wait for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._step_has_begun = False

    def update(self, means: Mapping[str, Mean]) -> None:
        """Add one micro-batch to the current step."""
        new = self._sums_of(means)
        if self._step_has_begun:
            self.sums[-1] += new
        else:
            self.sums = torch.cat([self.sums.view(-1, *new.shape), new[None]])
        self._step_has_begun = True

    def end_step(self) -> None:
        """End the current step: later micro-batches belong to the next one."""
        self._step_has_begun = False

    def compute(self) -> list[dict[str, float]]:  # type: ignore[override]
        """Return {name: sum / count} of each step since the last reset, on all ranks, with one wait for the device."""
        return [self._divided(step) for step in self.sums.tolist()]

    def reset(self) -> None:
        """Remove all steps."""
        super().reset()
        self._step_has_begun = False


class LabelledRewards(Metric):
    """Rewards of completions with labels and weights, gathered from all ranks, for AUC and histograms."""

    full_state_update = False
    rewards: list[Tensor]
    labels: list[Tensor]
    weights: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rewards", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")
        self.add_state("weights", [], dist_reduce_fx="cat")

    def update(self, rewards: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add rewards [n], whether each belongs to a desirable completion [n], and weights [n] (None: all 1)."""
        self.rewards.append(rewards.detach().float().flatten())
        self.labels.append(labels.detach().flatten())
        self.weights.append(torch.ones_like(self.rewards[-1]) if weights is None else weights.float().flatten())

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (rewards, labels, weights) of everything since the last reset, on all ranks."""
        return dim_zero_cat(self.rewards), dim_zero_cat(self.labels), dim_zero_cat(self.weights)


TIE = 1e-4
"""Rewards that differ by less count as equal. At the first step the policy equals the reference, and rewards differ by
rounding, up to 1e-5."""


def auc(rewards: Tensor, labels: Tensor, weights: Tensor | None = None) -> float | None:
    """Return P(reward of a desirable completion > reward of an undesirable one), where ties count half.

    Args:
        rewards: [n].
        labels: true for desirable completions [n].
        weights: how much each counts [n]; None: all the same.

    Returns:
        The probability, or None if all labels are the same.
    """
    if labels.all() or not labels.any():
        return None
    distinct, ranks = torch.unique((rewards.double() / TIE).round(), return_inverse=True)
    counts = torch.ones_like(rewards, dtype=torch.float64) if weights is None else weights.double()
    better, worse = (counts.new_zeros(len(distinct)).index_add(0, ranks, counts * side) for side in (labels, ~labels))
    # Each desirable completion beats the undesirable ones of lower ranks, and half of those of its own.
    beaten = worse.cumsum(0) - worse / 2
    return float(better @ beaten / (better.sum() * worse.sum()))
