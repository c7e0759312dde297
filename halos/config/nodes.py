"""Converts nodes of the configuration to plain values, and to the objects that they describe.

A constructor's signature is the schema of its YAML.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from halos.config.signatures import check_arguments

Node = dict[str, Any]
"""A section of a configuration as plain values: texts, numbers, lists and further sections by key."""
SOURCE_KEYS = (
    *("train", "val", "columns", "mix"),
    *("roles", "values", "ties", "votes", "transcripts", "bad_rows", "max_bad_rows"),
)
"""Keys of ``data`` that are parameters of its source, set as ``data.train=…`` because that is shorter to type."""


def plain(node: object) -> Node:
    """Return a node as plain dictionaries and lists, with interpolations resolved."""
    return cast("Node", OmegaConf.to_container(cast("DictConfig", node), resolve=True))


def flatten(node: object, prefix: str = "") -> Node:
    """Return the leaves of nested dictionaries by dotted keys: ``{"loss": {"beta": 0.1}}`` → ``{"loss.beta": 0.1}``.

    Lists and empty dictionaries are leaves.

    Args:
        node: plain containers.
        prefix: key of the node itself.
    """
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    flat: Node = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def build(node: DictConfig, *args: Any, without: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """Call the node's ``_target_`` with its keys and the arguments. Errors inside it are not changed."""
    make = as_partial(node, without)
    check_arguments(node._target_, make, *args, **kwargs)
    return make(*args, **kwargs)


def as_partial(node: DictConfig, without: tuple[str, ...]) -> partial[Any]:
    """Return the node's ``_target_`` with its keys bound, except those in ``without``."""
    # Plain containers: constructors take lists and dicts, and must not see the configuration's own types.
    keys = {key: value for key, value in plain(node).items() if key not in without}
    try:
        return cast("partial[Any]", instantiate(keys, _partial_=True, _convert_="all"))
    except InstantiationException as error:
        cause = error.__cause__
        where = next(filter(None, map(looked_for, _targets(keys))), "")
        other = ValueError(f"{node._target_}: {cause or error}{where}")
        raise cause if isinstance(cause, ValueError) else other from error


def _targets(node: object) -> Iterator[str]:
    return (str(value) for key, value in flatten(node).items() if key.rpartition(".")[2] == "_target_")


def looked_for(target: str) -> str:
    """Return where the module of a class was looked for, or an empty text if the module exists."""
    package = target.partition(".")[0]
    if not package or package in sys.modules or find_spec(package) is not None:
        return ""
    return f"; {package} was looked for in {Path.cwd()}, in PYTHONPATH and among installed packages"


def class_of(key: str, target: str, base: type[Any]) -> type[Any]:
    """Return the class that a node names. Raises ``ValueError`` if it cannot be imported or has another base class.

    Args:
        key: the node's key, for the error.
        target: the name of the class, the node's ``_target_``.
        base: what it has to be a subclass of.
    """
    try:
        cls = get_class(target)
    except Exception as error:  # Hydra raises several kinds
        raise ValueError(f"{key}._target_: {target} could not be imported: {error}{looked_for(target)}") from error
    if not issubclass(cls, base):
        raise ValueError(f"{key}._target_: expected a subclass of {base.__name__}, found {target}")
    return cls
