"""The configuration of a finished run, read from its folder as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

Node = dict[str, Any]
"""A section of a configuration: texts, numbers, lists and further sections by key."""


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A run's resolved configuration.

    Attributes:
        loss: the section of the loss.
        data: the section of the data.
        model: the section of the model.
        everything: the whole configuration, these sections included.
    """

    loss: Node
    data: Node
    model: Node
    everything: Node

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.everything["seed"])


def read_run_config(folder: Path) -> RunConfig:
    """Read ``config.yaml`` of a run's folder.

    Raises:
        ValueError: the file is not the configuration of a run.
    """
    file = folder / "config.yaml"
    try:
        config = OmegaConf.load(file)
    except Exception as error:  # YAML and OmegaConf raise errors of their own
        raise ValueError(f"{file}: expected a run's configuration, found {error}") from error
    if not isinstance(config, DictConfig) or not {"loss", "data", "model"} <= set(config):
        raise ValueError(f"{file}: expected a run's configuration with loss, data and model")
    everything: Any = OmegaConf.to_container(config, resolve=True)
    return RunConfig(everything["loss"], everything["data"], everything["model"], everything)


def flat_keys(node: Node, prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections: ``{"loss": {"beta": 0.1}}`` becomes ``{"loss.beta": 0.1}``; empty ones are dropped."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        flat |= flat_keys(value, name) if isinstance(value, dict) else {name: value}
    return flat
