"""Values of the configuration that other libraries let pass, and that mean something else there or fail late."""

from __future__ import annotations

from omegaconf import DictConfig

from halos.checks import check_whole

WHOLE = {
    "seed": 0,
    "trainer.accumulate_grad_batches": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.max_steps": -1,
    "sampling.prompts": 0,
    "sampling.max_new_tokens": 1,
    "sampling.size": 0,
}
"""Keys whose values are whole numbers, and the least of them."""


def check_values(cfg: DictConfig) -> None:
    """Raise ``ValueError`` with the first key whose value makes no sense."""
    for key, least in WHOLE.items():
        group, _, name = key.rpartition(".")
        check_whole(key, (cfg[group] if group else cfg)[name], least)
    if cfg.seed >= 2**32:
        raise ValueError(f"seed: expected a whole number below 2^32, found {cfg.seed}")
    for name in ("output_dir", "cache_dir"):
        if not isinstance(cfg[name], str):
            raise ValueError(f"{name}: expected a folder, found {cfg[name]!r}")
    _check_trainer(cfg.trainer)


def _check_trainer(cfg: DictConfig) -> None:
    for name in ("precision", "strategy", "logger"):
        if name in cfg:
            raise ValueError(f"trainer.{name}: expected {name}=…, found trainer.{name}={cfg[name]}")
    for name in ("max_epochs", "gradient_clip_val"):
        value = cfg[name]
        if value is not None and (isinstance(value, bool | str) or not value >= 0):
            raise ValueError(f"trainer.{name}: expected a number from 0 on or null, found {value!r}")
    if cfg.max_time is not None and not isinstance(cfg.max_time, str | DictConfig):
        raise ValueError(f"trainer.max_time: expected DD:HH:MM:SS, such as 00:12:00:00, found {cfg.max_time!r}")
