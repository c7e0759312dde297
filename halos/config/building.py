"""Builds objects from nodes of the configuration: a constructor's signature is the schema of its YAML."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from halos.config.signatures import check_arguments

SOURCE_KEYS = ("train", "val", "columns", "mix", "roles", "values", "ties", "transcripts", "bad_rows", "max_bad_rows")
"""Keys of ``data`` that belong to its source; they are set as ``data.train=…`` because that is shorter to type."""


def build(node: DictConfig, *args: Any, without: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """Call the node's ``_target_`` with its keys and the arguments; errors inside it come out as they are."""
    make = as_partial(node, without)
    check_arguments(node._target_, make, *args, **kwargs)
    return make(*args, **kwargs)


def as_partial(node: DictConfig, without: tuple[str, ...]) -> partial[Any]:
    # Plain containers: constructors take lists and dicts, and must not see the configuration's own types.
    resolved: Any = OmegaConf.to_container(node, resolve=True)
    keys = {key: value for key, value in resolved.items() if key not in without}
    try:
        return cast("partial[Any]", instantiate(keys, _partial_=True, _convert_="all"))
    except InstantiationException as error:
        cause = error.__cause__
        raise cause if isinstance(cause, ValueError) else ValueError(f"{node._target_}: {cause or error}") from error
