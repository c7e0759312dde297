"""Lightning's Trainer from the configuration: devices, strategy and precision, and which of them go together."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from halos.config.building import build
from halos.sharding.fsdp import FSDP, ShardedMixed
from halos.training.checkpoints import LocalCheckpointIO

log = logging.getLogger(__name__)

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")


def make_trainer(cfg: DictConfig, callbacks: Sequence[Callback], loggers: Sequence[Any]) -> pl.Trainer:
    """The Trainer of a run, which is one Lightning epoch whatever ``trainer.max_epochs`` says.

    Raises ``ValueError`` for devices, a strategy or a precision that do not go together.
    """
    check_precision(cfg.precision, strategy=cfg.strategy.name, accelerator=cfg.trainer.accelerator, lr=cfg.optim.lr)
    if cfg.strategy.name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ValueError("strategy=deepspeed: install the extra with pip install 'halos[deepspeed]'")
    if cfg.model.lora.enabled and cfg.strategy.name not in ("auto", "ddp", "fsdp"):
        raise ValueError(f"model.lora.enabled: expected strategy=auto, ddp or fsdp, found {cfg.strategy.name}")
    if cfg.model.lora.quantize and cfg.strategy.name.startswith("fsdp"):
        raise ValueError(
            f"model.lora.quantize: expected strategy=auto or ddp, found {cfg.strategy.name}; 4-bit weights are not "
            "divided"
        )
    if cfg.data.max_tokens_per_batch is not None and cfg.strategy.name not in ("auto", "ddp"):
        raise ValueError(f"data.max_tokens_per_batch: expected strategy=auto or ddp, found {cfg.strategy.name}")
    if cfg.strategy.name.startswith("fsdp") and str(cfg.optim._target_).endswith(".BitsAndBytesAdamW"):
        raise ValueError(f"optim: expected strategy=auto or ddp with bitsandbytes' AdamW, found {cfg.strategy.name}")
    if cfg.trainer.accelerator == "cpu" and (cfg.model.packed_attention == "flex" or cfg.model.lora.quantize):
        key = "packed_attention=flex" if cfg.model.packed_attention == "flex" else "lora.quantize"
        raise ValueError(f"model.{key}: expected a CUDA device, found trainer.accelerator=cpu")
    half = cfg.precision == "bf16-true" or (cfg.precision == "bf16-mixed" and cfg.strategy.name.startswith("fsdp"))
    if str(cfg.model.attention).startswith("flash") and not half:
        raise ValueError(
            f"model.attention: expected sdpa or null with precision={cfg.precision} and strategy={cfg.strategy.name}, "
            f"found {cfg.model.attention}, which computes with weights in bfloat16 alone (precision=bf16-true)"
        )
    given: Any = OmegaConf.to_container(cfg.trainer, resolve=True)
    options = {key: value for key, value in given.items() if value is not None}
    options.pop("max_epochs", None)
    options.pop("max_steps", None)
    options["plugins"] = [*(options.get("plugins") or ()), LocalCheckpointIO()]
    one_device = cfg.strategy.name == "auto"
    devices = options.setdefault("devices", 1 if one_device else "auto")
    if one_device and devices == "auto":
        devices = options["devices"] = 1  # of several, Lightning would take all
    if one_device and str(devices) != "1" and not (isinstance(devices, list) and len(devices) == 1):
        raise ValueError(f"trainer.devices: strategy=auto uses one device, found {devices}; set strategy=ddp")
    strategy = cfg.strategy.trainer if isinstance(cfg.strategy.trainer, str) else build(cfg.strategy.trainer)
    if isinstance(strategy, FSDP) and cfg.precision == "bf16-mixed":
        options["plugins"].append(ShardedMixed())
    else:
        options["precision"] = cfg.precision
    trainer = pl.Trainer(
        **options,
        strategy=strategy,
        max_epochs=1,
        callbacks=list(callbacks),
        logger=list(loggers),
        default_root_dir=cfg.output_dir,
        check_val_every_n_epoch=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        # What FSDP2 makes in its first forward, which a validation can be, would be no tensors to train with.
        inference_mode=False,
    )
    if isinstance(strategy, FSDP):
        strategy.check(trainer.world_size)
    return trainer


def validation_interval(interval: Any, *, steps: int, accumulate: int) -> int:
    """Micro-batches from one validation to the next, always whole optimizer steps: a checkpoint that is taken while
    validating has no place for the gradient of half a step.

    Args:
        interval: a share of the run, or a number of micro-batches.
        steps: optimizer steps of the run.
        accumulate: micro-batches a step.

    Raises ``ValueError`` for another interval, also one that is longer than the run.
    """
    if isinstance(interval, float) and 0 < interval <= 1:
        return max(1, int(steps * interval)) * accumulate
    if type(interval) is not int or not 0 < interval <= steps * accumulate or interval % accumulate:
        whole = "" if accumulate == 1 else f", a multiple of trainer.accumulate_grad_batches={accumulate}"
        raise ValueError(
            f"trainer.val_check_interval: expected at most the {steps * accumulate} micro-batches of the run{whole}, "
            f"or a share of it such as 0.25, found {interval!r}"
        )
    return interval


def check_precision(precision: str, *, strategy: str, accelerator: str, lr: float) -> None:
    """Raise ``ValueError`` for a precision that does not exist or not here; warn of steps that bfloat16 rounds away.

    A bfloat16 weight w keeps a change only if that is above |w| · 2⁻⁹, half the distance to its neighbour. AdamW
    changes weights by about the learning rate, and most weights of language models are near 0.02.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}; found {precision!r}")
    if precision == "16-mixed":
        if strategy.startswith("fsdp"):
            raise ValueError(f"precision=16-mixed: strategy={strategy} has no loss scaling; use precision=bf16-mixed")
        if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
            raise ValueError(
                f"precision=16-mixed: expected a CUDA device, found trainer.accelerator={accelerator} with "
                f"{torch.cuda.device_count()} CUDA devices; use precision=bf16-mixed"
            )
    if precision == "bf16-true" and lr < 0.02 * 2**-9:
        log.warning(
            "precision=bf16-true with optim.lr=%g: most steps are smaller than bfloat16 weights can take in, and are "
            "lost; precision=bf16-mixed keeps the weights in float32 (with strategy=fsdp each device only its part)",
            lr,
        )


def warn_if_emulated(precision: str, device: torch.device) -> None:
    """Warn of bfloat16 on a CPU that has no instructions for it."""
    supported: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(supported.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    if "bf16" in precision and device.type == "cpu" and supported.get("architecture") == "x86_64" and not native:
        log.warning(
            "precision=%s: this CPU has no bfloat16 instructions and emulates them, many times slower than "
            "precision=32-true",
            precision,
        )
