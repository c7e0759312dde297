"""The configuration that a finished run left in its folder, as other commands use it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

from halos.config.nodes import Node
from halos.config.roles import check_roles, check_trust, without_never_built
from halos.config.saved import read_saved

CONFIG = "config.yaml"


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """What other commands need of a run's configuration.

    Attributes:
        data: the node ``data``.
        seed: the run's seed.
        beta: β of the loss; in a mixture, β of the first part that has one. None: the loss has no β.
        control: the control token of desirable completions (CSFT), or an empty string.
        model: the node ``model``.
    """

    data: DictConfig
    seed: int
    beta: float | None
    control: str
    model: Node


def read_run(folder: Path) -> TrainedRun:
    """Read the configuration of a run; nothing that it names is imported. Raises ``ValueError`` as :func:`saved_run`.

    The node ``data`` may name any class, so pass it through :func:`halos.config.roles.trusted_node` before it is built.
    """
    config = saved_run(folder)
    loss = config["loss"]
    # In a mixture, β is a parameter of a part.
    parts = loss.get("parts") or {}
    losses = [part for part in (loss, *(parts.values() if isinstance(parts, dict) else ())) if isinstance(part, dict)]
    try:
        beta = next((float(part["beta"]) for part in losses if part.get("beta") is not None), None)
        seed = int(config.get("seed", 0))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG}: expected numbers as beta and seed: {error}") from error
    control = str(loss.get("desirable_token") or "")
    data = cast("DictConfig", OmegaConf.create(config["data"]))
    return TrainedRun(data, seed, beta, control, config["model"])


def saved_run(folder: Path) -> Node:
    """Read the configuration of a run as plain values.

    Raises:
        ValueError: the file was not written by a run; see :func:`halos.config.saved.read_saved`.
    """
    config = read_saved(folder / CONFIG)
    if not all(isinstance(config.get(key), dict) for key in ("loss", "data", "model")):
        raise ValueError(f"{folder / CONFIG}: expected a run's configuration with loss, data and model")
    if not isinstance(config["model"].get("lora") or {}, dict):
        raise ValueError(
            f"{folder / CONFIG}: expected keys and values in model.lora, found {config['model']['lora']!r}"
        )
    return config


def run_config(folder: Path, trust: object = (), trusted: Collection[str] = ()) -> DictConfig:
    """Read the configuration of a run for a command that builds its objective, optimizer, data or model again.

    Args:
        folder: the run's folder.
        trust: modules that the user trusts, besides this package.
        trusted: models whose own code may run; the run's own ``trust_remote_code`` is ignored.

    Raises:
        ValueError: as :func:`saved_run`, or the configuration names a class that it may not name.
    """
    config = without_never_built(saved_run(folder))
    if not isinstance(config.get("optim", {}), dict):
        raise ValueError(f"{folder / CONFIG}: expected a section optim, found {config['optim']!r}")
    try:
        check_roles(config, trust=check_trust(trust))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    config["model"] = {**config["model"], "trust_remote_code": config["model"].get("path") in trusted}
    return OmegaConf.create(config)
