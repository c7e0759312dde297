"""Optimizers and their learning-rate schedule."""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("constant", "linear", "cosine")


def _numbers(name: str, values: Any, told: str, *, count: int, below: float = math.inf) -> None:
    # Numbers from 0 on; ``told``: what is expected, in words.
    found = tuple(values) if isinstance(values, list | tuple) else (values,)
    plain = all(isinstance(value, int | float) and not isinstance(value, bool) for value in found)
    if len(found) != count or not plain or not all(0 <= value < below for value in found):
        raise ValueError(f"optim.{name}: expected {told}, found {values!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim(ABC):
    """An optimizer with linear warm-up, then a constant rate or a linear or cosine decay to zero at the end of the run.

    ``warmup`` is a fraction of the run below 1, and a number of optimizer steps from 1 on.
    Raises ``ValueError`` naming the key for values that make no sense.
    """

    lr: float = 5e-6
    weight_decay: float = 0.0
    warmup: float = 0.1
    schedule: str = "linear"

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup"):
            _numbers(name, getattr(self, name), "a number from 0 on", count=1)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule: expected one of {', '.join(SCHEDULES)}; found {self.schedule!r}")

    def check(self) -> None:
        """Raise ``ValueError`` for a missing package or device."""
        return

    def build(
        self, parameters: Iterable[Parameter], steps: int, *, fused: bool = True
    ) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The optimizer over the parameters and a schedule to be stepped once per optimizer step.

        ``fused``: in one kernel, where there is one. Such a kernel takes the loss's scale out of gradients by itself,
        behind clipping, which would see scaled ones.
        """
        optimizer = self._optimizer(list(parameters), fused)
        warmup = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        factor = partial(learning_rate_factor, warmup=warmup, steps=steps, schedule=self.schedule)
        return optimizer, LambdaLR(optimizer, factor)

    @abstractmethod
    def _optimizer(self, parameters: list[Parameter], fused: bool) -> torch.optim.Optimizer: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW(Optim):
    """torch's: two float32 moments a weight."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        Optim.__post_init__(self)
        _numbers("betas", self.betas, "two numbers from 0 to below 1", count=2, below=1)
        _numbers("eps", self.eps, "a number from 0 on", count=1)

    def _optimizer(self, parameters: list[Parameter], fused: bool) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, **self._options(), fused=fused or None)

    def _options(self) -> dict[str, Any]:
        return {"lr": self.lr, "betas": tuple(self.betas), "eps": self.eps, "weight_decay": self.weight_decay}


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsAndBytesAdamW(AdamW):
    """bitsandbytes' AdamW, CUDA only: moments of 8 ``bits`` (arXiv 2110.02861) or of 32, in memory that the driver
    moves to the host when the GPU's runs out if they are ``paged`` (QLoRA, arXiv 2305.14314)."""

    bits: int = 8
    paged: bool = False

    def __post_init__(self) -> None:
        AdamW.__post_init__(self)
        if self.bits not in (8, 32):
            raise ValueError(f"optim.bits: expected 8 or 32, found {self.bits!r}")

    def check(self) -> None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("optim: bitsandbytes is missing; install the extra with pip install 'halos[bnb]'")
        if not torch.cuda.is_available():
            raise ValueError("optim: bitsandbytes' optimizers need a CUDA device, found none")

    def _optimizer(self, parameters: list[Parameter], fused: bool) -> torch.optim.Optimizer:
        self.check()
        elsewhere = {p.device.type for p in parameters} - {"cuda"}
        if elsewhere:
            raise ValueError(f"optim: bitsandbytes' optimizers need weights on a CUDA device, found {min(elsewhere)}")
        import bitsandbytes

        made: torch.optim.Optimizer = bitsandbytes.optim.AdamW(
            parameters, **self._options(), optim_bits=self.bits, is_paged=self.paged
        )
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSprop(Optim):
    """torch's, without momentum: one moment a weight, in its precision, with decay ``alpha``."""

    lr: float = 5e-7
    warmup: float = 150
    schedule: str = "constant"
    alpha: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        Optim.__post_init__(self)
        _numbers("alpha", self.alpha, "a number from 0 to below 1", count=1, below=1)
        _numbers("eps", self.eps, "a number from 0 on", count=1)

    def _optimizer(self, parameters: list[Parameter], fused: bool) -> torch.optim.Optimizer:
        options: dict[str, Any] = {
            "lr": self.lr,
            "alpha": self.alpha,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }
        return torch.optim.RMSprop(parameters, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adafactor(Optim):
    """transformers' Adafactor (arXiv 1804.04235): of a matrix's second moments only the means of rows and columns are
    kept, and no first moments.

    Args:
        eps: ε₁ beside squared gradients, and ε₂, the least root mean square of weights that ``scale_parameter`` sees.
            One number is beside gradients as AdamW's, so that ε₁ is its square.
        clip_threshold: d, the largest root mean square of an update.
        decay_rate: of the second moments, β₂ = 1 − step^decay_rate.
        scale_parameter: multiply the rate by the root mean square of the weights, as in the paper. Off, ``lr`` means
            what it does for AdamW; on, weights that start at zero (LoRA's B) hardly move.
    """

    eps: tuple[float, float] | float = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    scale_parameter: bool = False

    def __post_init__(self) -> None:
        Optim.__post_init__(self)
        one = isinstance(self.eps, int | float)
        _numbers("eps", self.eps, "one or two numbers from 0 on, such as [1e-30,1e-3]", count=1 if one else 2)

    def _optimizer(self, parameters: list[Parameter], fused: bool) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor as TransformersAdafactor

        return TransformersAdafactor(
            parameters,
            lr=self.lr,
            eps=tuple(self.eps) if isinstance(self.eps, list | tuple) else (self.eps**2, 1e-3),
            clip_threshold=self.clip_threshold,
            decay_rate=self.decay_rate,
            weight_decay=self.weight_decay,
            scale_parameter=self.scale_parameter,
            relative_step=False,
            warmup_init=False,
        )


def learning_rate_factor(step: int, *, warmup: int, steps: int, schedule: str) -> float:
    """The share of the peak rate used by the optimizer step number ``step`` (from 0)."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    left = max(0.0, (steps - step) / max(1, steps - warmup))
    return left if schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))
