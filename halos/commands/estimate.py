"""``estimate(cfg)``: the memory and time of a run on given devices, before any of them is booked."""

from typing import Any

from omegaconf import DictConfig

from halos import terminal
from halos.checks import check_choice, check_share, check_whole
from halos.training.gpus import GPUS


def estimate(cfg: DictConfig) -> dict[str, Any]:
    """Print and return what the configured run needs.

    Returns:
        The bytes of a device by part (``memory``), their ``total``, whether it ``fits``, the bytes of activations in
        the host's memory (``host_memory``), the ``operations``, ``kernels`` and ``step_seconds`` of an optimizer step
        on a device, and the ``hours``; None where the number of examples is not known.

    Raises:
        ValueError: an unknown GPU, a model whose config cannot be read, or settings that cannot be traced.
    """
    _check(cfg)
    terminal.set_up_logging()
    # Imports torch, which takes seconds.
    from halos.commands.estimate_step import estimate_step

    return estimate_step(cfg)


def _check(cfg: DictConfig) -> None:
    check_choice("estimate.gpu", cfg.estimate.gpu, GPUS)
    check_share("estimate.utilisation", cfg.estimate.utilisation)
    check_whole("estimate.examples", cfg.estimate.examples, 1, null=True)
    check_whole("data.batch_size", cfg.data.batch_size, 1)
    check_whole("data.max_length", cfg.data.max_length, 2)
    check_whole("data.max_tokens_per_batch", cfg.data.max_tokens_per_batch, 1, null=True)
    check_whole("trainer.accumulate_grad_batches", cfg.trainer.accumulate_grad_batches, 1)
    check_whole("trainer.num_nodes", cfg.trainer.num_nodes, 1)
    check_choice("strategy of an estimate", cfg.strategy.name, ("auto", "ddp", "fsdp"))
    if cfg.model.lora.quantize:
        raise ValueError("model.lora.quantize: expected null for an estimate, found 4bit; its kernels are not traced")
    if cfg.trainer.devices is not None and (type(cfg.trainer.devices) is not int or cfg.trainer.devices < 1):
        raise ValueError(f"trainer.devices: expected a number for an estimate, found {cfg.trainer.devices!r}")
