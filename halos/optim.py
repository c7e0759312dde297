"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """AdamW with linear warm-up, then a constant rate or a linear or cosine decay to zero at the end of the run.

    ``warmup`` is a fraction of the run below 1, and a number of optimizer steps from 1 on.
    Raises ``ValueError`` naming the key for values that make no sense.
    """

    lr: float = 5e-6
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: float = 0.1
    schedule: str = "linear"

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name}: expected a number from 0 on, found {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule: expected one of {', '.join(SCHEDULES)}; found {self.schedule!r}")

    def build(self, parameters: Iterable[Parameter], steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The optimizer over the parameters and a schedule to be stepped once per optimizer step."""
        first, second = self.betas
        optimizer = torch.optim.AdamW(
            parameters, lr=self.lr, betas=(first, second), eps=self.eps, weight_decay=self.weight_decay, fused=True
        )
        warmup = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        factor = partial(learning_rate_factor, warmup=warmup, steps=steps, schedule=self.schedule)
        return optimizer, LambdaLR(optimizer, factor)


def learning_rate_factor(step: int, *, warmup: int, steps: int, schedule: str) -> float:
    """The share of the peak rate used by the optimizer step number ``step`` (from 0)."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    left = max(0.0, (steps - step) / max(1, steps - warmup))
    return left if schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))
