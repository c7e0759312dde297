"""Checks of configuration values that other libraries would misunderstand, or refuse only late in a run."""

from __future__ import annotations

from omegaconf import DictConfig

from halos.checks import check_choice, check_number, check_whole
from halos.config.combinations import check_combinations, values_of

WHOLE = {
    "seed": 0,
    "trainer.accumulate_grad_batches": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.max_steps": -1,
    "sampling.prompts": 0,
    "sampling.kl_prompts": 0,
    "sampling.max_new_tokens": 1,
    "sampling.size": 0,
}
"""Keys whose values are whole numbers, and the smallest accepted value."""


def check_values(cfg: DictConfig) -> None:
    """Raise ``ValueError`` for the first key whose value is invalid, by itself or together with others."""
    values = values_of(cfg)
    for key, least in WHOLE.items():
        check_whole(key, values[key], least)
    if cfg.seed >= 2**32:  # numpy's limit
        raise ValueError(f"seed: expected a whole number below 2^32, found {cfg.seed}")
    for key in ("output_dir", "cache_dir"):
        if not isinstance(values[key], str):
            raise ValueError(f"{key}: expected a folder, found {values[key]!r}")
    check_choice("checkpoint.export", cfg.checkpoint.export, ("last", "best"))
    if cfg.sampling.validations != "auto":
        check_whole("sampling.validations", cfg.sampling.validations, 1)
    for name in ("kl", "win_rate"):
        if (value := cfg.sampling[name]) not in ("auto", True, False):
            raise ValueError(f"sampling.{name}: expected auto, true or false, found {value!r}")
    _check_trainer(cfg.trainer)
    check_combinations(values)


def _check_trainer(cfg: DictConfig) -> None:
    for name in ("precision", "strategy", "logger"):
        if name in cfg:
            raise ValueError(f"trainer.{name}: expected {name}=…, found trainer.{name}={cfg[name]}")
    for name in ("max_epochs", "gradient_clip_val"):
        check_number(f"trainer.{name}", cfg[name], null=True)
    if cfg.max_time is not None and not isinstance(cfg.max_time, str | DictConfig):
        raise ValueError(f"trainer.max_time: expected DD:HH:MM:SS, such as 00:12:00:00, found {cfg.max_time!r}")
