"""Lightning's Trainer for a run: one epoch, a checked precision, and checkpoints that are written atomically."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

from halos.checks import check_choice
from halos.sharding.fsdp import FSDP, ShardedMixed
from halos.training.checkpoints import LocalCheckpointIO

log = logging.getLogger(__name__)

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")


def make_trainer(
    arguments: Mapping[str, Any],
    *,
    strategy: Strategy | str,
    precision: str,
    output_dir: str,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
) -> pl.Trainer:
    """Make the Trainer of a run.

    Args:
        arguments: Lightning's own arguments, passed through; None stands for Lightning's default. ``max_epochs`` and
            ``max_steps`` are left out: the data module counts passes and steps, and a run is one Lightning epoch.
        strategy: ``auto`` for one device, or a strategy of Lightning or of :mod:`halos.sharding`.
        precision: one of :data:`PRECISIONS`.
        output_dir: the run's folder.
        callbacks: the callbacks, in the order in which Lightning calls them.
        loggers: all loggers; Lightning adds none.

    Raises:
        ValueError: the precision or the accelerator does not exist (on this machine), or the strategy does not fit the
            number of devices.
    """
    accelerator = str(arguments.get("accelerator") or "auto")
    check_accelerator(accelerator)
    check_precision(precision, accelerator)
    counted = ("max_epochs", "max_steps")
    options = {name: value for name, value in arguments.items() if value is not None and name not in counted}
    plugins = [*(options.pop("plugins", None) or ()), LocalCheckpointIO()]
    if strategy == "auto" and options.get("devices", "auto") == "auto":
        options["devices"] = 1  # Lightning would take all devices of the machine, and start ranks for them
    if isinstance(strategy, FSDP) and precision == "bf16-mixed":
        plugins.append(ShardedMixed())
    else:
        options["precision"] = precision
    trainer = pl.Trainer(
        **options,
        strategy=strategy,
        plugins=plugins,
        max_epochs=1,
        callbacks=list(callbacks),
        logger=list(loggers),
        default_root_dir=output_dir,
        check_val_every_n_epoch=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the data module divides the examples over the ranks itself
        enable_model_summary=False,
        # FSDP2 keeps tensors that its first forward makes. If that is a validation in inference mode, they cannot be
        # trained with later.
        inference_mode=False,
    )
    if isinstance(strategy, FSDP):
        strategy.check(trainer.world_size)
    leave_signals_to_hosts(trainer)
    return trainer


def leave_signals_to_hosts(trainer: pl.Trainer) -> None:
    """Keep the Trainer's ranks from exchanging signals through their devices.

    Before every micro-batch Lightning's ranks exchange whether the first one has received SIGTERM, and wait for their
    devices to read the result. In a run of the command, the hosts exchange signals after each step instead
    (:mod:`halos.processes.signals`).
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def validation_interval(interval: float | int, *, steps: int, accumulate: int) -> int:
    """Return how many micro-batches lie between two validations: always whole optimizer steps.

    A checkpoint that is written during a validation cannot hold the gradient of half a step.

    Args:
        interval: a share of the run (a float up to 1), or a number of micro-batches.
        steps: optimizer steps of the run.
        accumulate: micro-batches of one optimizer step.

    Raises:
        ValueError: for other intervals, such as one that is longer than the run.
    """
    if isinstance(interval, float) and 0 < interval <= 1:
        # Rounded up: a quarter of 7 steps is two, so that a short run is not validated after each of them.
        return math.ceil(round(steps * interval, 6)) * accumulate
    if type(interval) is not int or not 0 < interval <= steps * accumulate or interval % accumulate:
        multiple = "" if accumulate == 1 else f", a multiple of trainer.accumulate_grad_batches={accumulate}"
        expected = f"up to {steps * accumulate} micro-batches, all of the run{multiple}, or a share of it such as 0.25"
        raise ValueError(f"trainer.val_check_interval: expected {expected}, found {interval!r}")
    return interval


def check_accelerator(accelerator: str) -> None:
    """Raise ``ValueError`` for an accelerator that Lightning does not know, or that this machine does not have."""
    known = sorted(AcceleratorRegistry.available_accelerators())
    check_choice("trainer.accelerator", accelerator, ("auto", "gpu", *known))
    names = {"auto": ["cpu"], "gpu": ["cuda", "mps"]}.get(accelerator, [accelerator])
    if not any(map(_is_available, names)):
        raise ValueError(f"trainer.accelerator: expected one of this machine, such as cpu, found {accelerator}")


def _is_available(accelerator: str) -> bool:
    try:
        return bool(AcceleratorRegistry.get(accelerator).is_available())
    except ModuleNotFoundError:  # the package that TPUs need
        return False


def check_precision(precision: str, accelerator: str) -> None:
    """Raise ``ValueError`` for a precision that does not exist, or that needs a CUDA device which is not there."""
    check_choice("precision", precision, PRECISIONS)
    if precision == "16-mixed" and (accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available()):
        found = f"16-mixed with trainer.accelerator={accelerator} and {torch.cuda.device_count()} CUDA devices"
        raise ValueError(f"precision: expected bf16-mixed without a CUDA device, found {found}")


def warn_of_lost_steps(precision: str, lr: float) -> None:
    """Warn of steps that are lost to the rounding of bfloat16 weights.

    A bfloat16 weight w changes only if the change is larger than |w| · 2⁻⁹, half the distance to its neighbour. AdamW
    changes weights by about the learning rate, and most weights of language models are near 0.02.
    """
    if precision == "bf16-true" and lr < 0.02 * 2**-9:
        lost = "most steps are too small for bfloat16 weights, and are lost"
        hint = "precision=bf16-mixed keeps the weights in float32 (with strategy=fsdp each device only its part)"
        log.warning("precision=bf16-true with optim.lr=%g: %s; %s", lr, lost, hint)


def warn_if_emulated(precision: str, device: torch.device) -> None:
    """Warn of bfloat16 on a CPU that has no instructions for it."""
    supported: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(supported.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    if "bf16" in precision and device.type == "cpu" and supported.get("architecture") == "x86_64" and not native:
        emulated = "this CPU has no bfloat16 instructions and emulates them"
        log.warning("precision=%s: %s, many times slower than precision=32-true", precision, emulated)
