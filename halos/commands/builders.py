"""Builds the data, the objective and the model that the nodes of a configuration describe."""

from functools import partial
from typing import cast

import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from halos.config.nodes import SOURCE_KEYS, as_partial, build, class_of, plain
from halos.data.module import PreferenceDataModule
from halos.loop.humanline import Humanline
from halos.objectives.base import Objective
from halos.optim import Optim
from halos.policy.kernels.liger import check_liger
from halos.policy.loading import ModelSpec
from halos.policy.logprobs.compiling import check_compiler
from halos.sharding.factory import BackboneFactory
from halos.sharding.fsdp_tp import check_model


def build_data(
    node: DictConfig, *, seed: int, cache_dir: str | None = "auto", cache_key_file: str | None = None
) -> PreferenceDataModule:
    """Build the DataModule from the ``data`` node of a configuration."""
    target = {"_target_": "halos.data.StreamingDataModule"} if node.streaming else {}
    node = cast("DictConfig", OmegaConf.merge(node, target))
    only_streams = ("streaming",) if node.streaming else ("streaming", "shuffle_buffer")
    cache = {"cache_dir": cache_dir, "cache_key_file": cache_key_file}
    data: PreferenceDataModule = build(node, without=(*SOURCE_KEYS, *only_streams), seed=seed, **cache)
    return data


def objective_maker(node: DictConfig) -> partial[Objective]:
    """Return the constructor of a ``loss`` node's objective, with its parameters bound; it takes a backbone."""
    class_of("loss", node._target_, Objective)  # called for its errors, which name the class
    return as_partial(node, ("name",))


def build_objective(cfg: DictConfig, optim: Optim) -> Objective:
    """Build the objective from a run's configuration, without a backbone: its needs decide how that is loaded.

    Raises ``ValueError`` for a bad class and bad parameters.
    """
    class_of("loss", cfg.loss._target_, Objective)
    if not isinstance(cfg.humanline, DictConfig):
        raise ValueError(f"humanline: expected keys with values, found {cfg.humanline!r}")
    humanline = plain(cfg.humanline)
    clamp = Humanline(**humanline) if humanline.pop("enabled", False) else None
    common = {"optim": optim, "seed": cfg.seed, "humanline": clamp, "non_finite": cfg.non_finite}
    return cast("Objective", build(cfg.loss, None, without=("name",), **common))


def build_model(cfg: DictConfig, objective: Objective, optim: Optim) -> BackboneFactory:
    """Build the factory that loads the policy and its reference once the strategy is set up."""
    spec: ModelSpec = build(cfg.model)
    if spec.compile:
        check_compiler(cfg.trainer.accelerator)
    if spec.liger:
        check_liger(cfg.trainer.accelerator)
    streaming, divergence = cfg.data.streaming and objective.needs.reference, objective.needs.divergence
    spec = spec.resolved(streaming=streaming, divergence=divergence)
    if cfg.strategy.name == "fsdp_tp":
        check_model(spec, optim, cfg.strategy.tensor_parallel_size)
    return BackboneFactory(spec, dtype=torch.bfloat16 if cfg.precision == "bf16-true" else torch.float32)


def build_callbacks(cfg: DictConfig) -> list[Callback]:
    """Build the callbacks in the key ``callbacks``, which a run has in addition to its own, by name.

    Raises ``ValueError`` for a class that is not a callback, and for bad arguments.
    """
    callbacks: list[Callback] = []
    for name, node in (cfg.get("callbacks") or {}).items():
        key = f"callbacks.{name}"
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise ValueError(f"{key}: expected a _target_ and its arguments, found {node!r}")
        class_of(key, node._target_, Callback)
        callbacks.append(build(node))
    return callbacks
