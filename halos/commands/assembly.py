"""From the configuration to the pieces of a run."""

from __future__ import annotations

from functools import partial
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from halos.config.building import SOURCE_KEYS, as_partial, build
from halos.data.module import PreferenceDataModule
from halos.loop.humanline import Humanline
from halos.objectives.base import BackboneSource, Objective
from halos.optim import Optim


def build_data(node: DictConfig, **more: Any) -> PreferenceDataModule:
    """The DataModule of a ``data`` node."""
    node = OmegaConf.merge(node, {"_target_": "halos.data.StreamingDataModule"} if node.streaming else {})  # type: ignore[assignment]
    only_streams = ("streaming",) if node.streaming else ("streaming", "shuffle_buffer")
    data: PreferenceDataModule = build(node, without=(*SOURCE_KEYS, *only_streams), **more)
    return data


def objective_class(node: DictConfig) -> type[Objective]:
    """The class that ``loss`` names. Raises ``ValueError`` if it is not an objective or cannot be imported."""
    try:
        found = get_class(node._target_)
    except Exception as error:  # Hydra raises several kinds
        raise ValueError(f"loss._target_: {node._target_} could not be imported: {error}") from error
    if not issubclass(found, Objective):
        raise ValueError(f"loss._target_: expected a subclass of halos.objectives.Objective, found {node._target_}")
    return found


def build_objective(cfg: DictConfig, backbone: BackboneSource | None, optim: Optim) -> Objective:
    """The objective of a run's configuration. Raises ``ValueError`` for a bad class and bad parameters."""
    objective_class(cfg.loss)  # or an error that names it
    options = {str(key): value for key, value in cfg.humanline.items() if key != "enabled"}
    made: Objective = build(
        cfg.loss,
        backbone,
        without=("name",),
        optim=optim,
        seed=cfg.seed,
        humanline=Humanline(**options) if cfg.humanline.enabled else None,
        non_finite=cfg.non_finite,
    )
    return made


def objective_maker(node: DictConfig) -> partial[Objective]:
    """The objective of a ``loss`` node with its parameters; it still wants a backbone."""
    objective_class(node)
    return as_partial(node, ("name",))
