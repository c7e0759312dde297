"""The configuration that a finished run left in its folder, as other commands use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from halos.config.nodes import Node, plain


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """What other commands need of a run's configuration.

    Attributes:
        data: the node ``data``.
        seed: the run's seed.
        beta: β of the loss; of a mixture, β of its first part that has one. None: the loss has none.
        control: the control token of desirable completions (CSFT), or an empty string.
        model: the node ``model``.
    """

    data: DictConfig
    seed: int
    beta: float | None
    control: str
    model: Node


def read_run(folder: Path) -> TrainedRun:
    """Read the configuration of a run. Raises ``ValueError`` as :func:`run_config` does."""
    config = run_config(folder)
    # A mixture has its β in one of its parts.
    losses = (config.loss, *(config.loss.get("parts") or {}).values())
    beta = next((float(part.beta) for part in losses if part.get("beta") is not None), None)
    control = str(config.loss.get("desirable_token") or "")
    return TrainedRun(config.data, config.get("seed", 0), beta, control, plain(config.model))


def run_config(folder: Path) -> DictConfig:
    """Read the resolved configuration of a run. Raises ``ValueError`` if the file is not one of this project's."""
    try:
        config = OmegaConf.load(folder / "config.yaml")
    except Exception as error:  # YAML's and OmegaConf's own kinds
        raise ValueError(f"{folder / 'config.yaml'}: expected a run's configuration, found {error}") from error
    if not isinstance(config, DictConfig) or not {"loss", "data", "model"} <= set(config):
        raise ValueError(f"{folder / 'config.yaml'}: expected a run's configuration with loss, data and model")
    return config
