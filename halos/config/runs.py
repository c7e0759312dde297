"""The configuration that a finished run left in its folder, as other commands use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

Node = dict[str, Any]
"""A section of a configuration as plain values: texts, numbers, lists and further sections by key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """What other commands need of a run's configuration.

    Attributes:
        data: the node ``data``.
        seed: the run's seed.
        beta: β of the loss; of a mixture, β of its first part that has one. None: the loss has none.
        control: the control token of desirable completions (CSFT), or an empty string.
        model_path, random_weights, reference_path, chat_template, chat_template_kwargs: the keys of ``model``.
        adapter: the adapter that the policy started from (``model.lora.path``).
    """

    data: DictConfig
    seed: int
    beta: float | None
    control: str
    model_path: str
    random_weights: bool
    reference_path: str | None
    chat_template: str | None
    chat_template_kwargs: Node
    adapter: str | None


def read_run(folder: Path) -> TrainedRun:
    """Read the configuration of a run. Raises ``ValueError`` as :func:`run_config` does."""
    config = run_config(folder)
    loss, model = config.loss, config.model
    # A mixture has its β in one of its parts.
    losses = (loss, *(loss.get("parts") or {}).values())
    return TrainedRun(
        data=config.data,
        seed=config.get("seed", 0),
        beta=next((float(part.beta) for part in losses if part.get("beta") is not None), None),
        control=str(loss.get("desirable_token") or ""),
        model_path=str(model.path),
        random_weights=bool(model.get("random_weights")),
        reference_path=model.get("reference_path"),
        chat_template=model.get("chat_template"),
        chat_template_kwargs=dict(model.get("chat_template_kwargs") or {}),
        adapter=(model.get("lora") or {}).get("path"),
    )


def run_config(folder: Path) -> DictConfig:
    """Read the resolved configuration of a run. Raises ``ValueError`` if the file is not one of this project's."""
    try:
        config = OmegaConf.load(folder / "config.yaml")
    except Exception as error:  # YAML's and OmegaConf's own kinds
        raise ValueError(f"{folder / 'config.yaml'}: expected a run's configuration, found {error}") from error
    if not isinstance(config, DictConfig) or not {"loss", "data", "model"} <= set(config):
        raise ValueError(f"{folder / 'config.yaml'}: expected a run's configuration with loss, data and model")
    return config


def read_config(folder: Path) -> Node:
    """Read the resolved configuration of a run as plain values. Raises ``ValueError`` as :func:`run_config` does."""
    config: Any = OmegaConf.to_container(run_config(folder), resolve=True)
    return dict(config)
