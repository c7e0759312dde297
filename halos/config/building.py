"""Builds objects from nodes of the configuration: a constructor's signature is the schema of its YAML."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

SOURCE_KEYS = ("train", "val", "columns", "mix")
"""Keys of ``data`` that belong to its source; they are set as ``data.train=…`` because that is shorter to type."""


def build(node: DictConfig, *args: Any, without: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """Call the node's ``_target_`` with its keys and the arguments; its own ValueErrors come out as they are."""
    make = as_partial(node, without)
    try:
        return make(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{node._target_} does not take these parameters: {error}") from error


def as_partial(node: DictConfig, without: tuple[str, ...]) -> partial[Any]:
    resolved: Any = OmegaConf.to_container(node, resolve=True)
    keys = {key: value for key, value in resolved.items() if key not in without}
    try:
        return cast("partial[Any]", instantiate(keys, _partial_=True, _convert_="all"))
    except InstantiationException as error:
        cause = error.__cause__
        raise cause if isinstance(cause, ValueError) else ValueError(f"{node._target_}: {cause or error}") from error
