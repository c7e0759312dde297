"""Optimizers and their learning-rate schedule."""

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from halos.checks import check_choice, check_number, is_number

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim(ABC):
    """Settings of an optimizer and of its learning-rate schedule.

    The rate rises linearly during the warm-up. Then it stays constant, or decays to zero at the end of the run.

    Args:
        lr: the peak learning rate.
        weight_decay: decoupled weight decay. RMSprop and Adafactor apply it as their libraries do.
        warmup: below 1 a fraction of the run, from 1 on a number of optimizer steps.
        schedule: ``constant``, ``linear`` or ``cosine``, after the warm-up.

    Raises:
        ValueError: naming the key, for a value that is not possible.
    """

    lr: float = 5e-6
    weight_decay: float = 0.0
    warmup: float = 0.1
    schedule: str = "linear"

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup"):
            check_number(f"optim.{name}", getattr(self, name))
        check_choice("optim.schedule", self.schedule, SCHEDULES)

    def check(self) -> None:
        """Check that the optimizer can run on this machine.

        Raises:
            ValueError: for a missing package or device.
        """
        return

    def build(
        self, parameters: Iterable[Parameter], steps: int, *, fused: bool = True
    ) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Make the optimizer and its schedule.

        Args:
            parameters: the weights to train.
            steps: optimizer steps of the whole run.
            fused: whether to use one kernel for all weights, where there is one. Not with float16: such a kernel
                unscales gradients itself, which is after clipping, so scaled gradients would be clipped.

        Returns:
            The optimizer, and a schedule to step once after each optimizer step.
        """
        optimizer = self._optimizer(list(parameters), fused)
        warmup = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        factor = partial(learning_rate_factor, warmup=warmup, steps=steps, schedule=self.schedule)
        return optimizer, LambdaLR(optimizer, factor)

    @abstractmethod
    def _optimizer(self, parameters: list[Parameter], fused: bool) -> torch.optim.Optimizer: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW(Optim):
    """torch.optim.AdamW, with two moments for each weight."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        Optim.__post_init__(self)
        if not _are_numbers(self.betas, 2, below=1):
            raise ValueError(f"optim.betas: expected two numbers from 0 to below 1, found {self.betas!r}")
        check_number("optim.eps", self.eps)

    def _optimizer(self, parameters: list[Parameter], fused: bool) -> torch.optim.Optimizer:
        betas = (self.betas[0], self.betas[1])  # YAML has lists
        # fused=None leaves torch its loop over groups of weights, which False would forbid.
        return torch.optim.AdamW(parameters, self.lr, betas, self.eps, self.weight_decay, fused=fused or None)


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsAndBytesAdamW(AdamW):
    """bitsandbytes' AdamW, on CUDA only.

    Args:
        bits: 8 (arXiv 2110.02861) or 32 for each number of the moments.
        paged: whether the driver may move the moments to the host when the GPU's memory runs out (QLoRA,
            arXiv 2305.14314).
    """

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
        if other_devices := {p.device.type for p in parameters} - {"cuda"}:
            devices = ", ".join(sorted(other_devices))
            raise ValueError(f"optim: bitsandbytes' optimizers need weights on a CUDA device, found {devices}")
        import bitsandbytes

        values = {"lr": self.lr, "betas": tuple(self.betas), "eps": self.eps, "weight_decay": self.weight_decay}
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW(
            parameters, **values, optim_bits=self.bits, is_paged=self.paged
        )
        return optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSprop(Optim):
    """torch.optim.RMSprop without momentum: one moment for each weight, in the weight's precision.

    Args:
        alpha: the decay of the moment.
        eps: added to the root of the moment.
    """

    lr: float = 5e-7
    warmup: float = 150
    schedule: str = "constant"
    alpha: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        Optim.__post_init__(self)
        if not _are_numbers(self.alpha, 1, below=1):
            raise ValueError(f"optim.alpha: expected a number from 0 to below 1, found {self.alpha!r}")
        check_number("optim.eps", self.eps)

    def _optimizer(self, parameters: list[Parameter], fused: bool) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(parameters, self.lr, self.alpha, self.eps, self.weight_decay)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adafactor(Optim):
    """transformers' Adafactor (arXiv 1804.04235), which needs the least memory.

    It stores the means of the rows and columns of a matrix's second moments, and no first moments.

    Args:
        eps: ε₁, added to squared gradients, and ε₂, the smallest root mean square of weights that ``scale_parameter``
            uses. A single number is AdamW's ε, which is added to gradients, so ε₁ is its square.
        clip_threshold: d, the largest root mean square of an update.
        decay_rate: of the second moments, β₂ = 1 − step^decay_rate.
        scale_parameter: whether to multiply the rate by the root mean square of the weights, as in the paper. Off,
            ``lr`` means the same as for AdamW. On, weights that start at zero (LoRA's B) hardly move.
    """

    eps: tuple[float, float] | float = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    scale_parameter: bool = False

    def __post_init__(self) -> None:
        Optim.__post_init__(self)
        if not _are_numbers(self.eps, 2 if isinstance(self.eps, list | tuple) else 1):
            expected = "one or two numbers from 0 on, such as [1e-30,1e-3]"
            raise ValueError(f"optim.eps: expected {expected}, found {self.eps!r}")

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


def _are_numbers(values: object, count: int, below: float = math.inf) -> bool:
    numbers = values if isinstance(values, list | tuple) else (values,)
    return len(numbers) == count and all(is_number(n) and 0 <= n < below for n in numbers)


def learning_rate_factor(step: int, *, warmup: int, steps: int, schedule: str) -> float:
    """Return the share of the peak rate that optimizer step number ``step`` (from 0) uses."""
    # The first step of a warm-up has a rate above zero, and the first step after it the peak rate.
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    left = max(0.0, (steps - step) / max(1, steps - warmup))
    return left if schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))
