"""Lightning's Trainer from the configuration: devices, strategy and precision, and which of them go together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from halos.runs.fsdp import FSDP, ShardedMixed

log = logging.getLogger(__name__)


def make_trainer(cfg: DictConfig, callbacks: Sequence[Callback], loggers: Sequence[Any]) -> pl.Trainer:
    """The Trainer of a run, which is one Lightning epoch whatever ``trainer.max_epochs`` says.

    Raises ``ValueError`` for devices, a strategy or a precision that do not go together.
    """
    given: Any = OmegaConf.to_container(cfg.trainer, resolve=True)
    options = {key: value for key, value in given.items() if value is not None}
    options.pop("max_epochs", None)
    options.pop("max_steps", None)
    one_device = cfg.strategy.name == "auto"
    devices = options.setdefault("devices", 1 if one_device else "auto")
    if one_device and str(devices) not in ("1", "auto") and not isinstance(devices, list):
        raise ValueError(f"trainer.devices: strategy=auto uses one device, found {devices}; set strategy=ddp")
    strategy = cfg.strategy.trainer if isinstance(cfg.strategy.trainer, str) else instantiate(cfg.strategy.trainer)
    trainer = pl.Trainer(
        **options,
        **_precision(cfg.precision, strategy, options),
        strategy=strategy,
        max_epochs=1,
        callbacks=list(callbacks),
        logger=list(loggers),
        default_root_dir=cfg.output_dir,
        check_val_every_n_epoch=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
    )
    if isinstance(strategy, FSDP):
        strategy.check(trainer.world_size)
    return trainer


def _precision(precision: str, strategy: Any, options: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(strategy, FSDP) or precision != "bf16-mixed":
        return {"precision": precision}
    return {"plugins": [ShardedMixed(), *options.pop("plugins", ())]}


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
