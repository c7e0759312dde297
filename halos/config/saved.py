"""Reads configurations that a run has saved, as plain data: the folder may come from a stranger."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from halos.config.nodes import Node

LONGEST, DEEPEST = 2**18, 32
"""The largest size in bytes and the deepest nesting that are accepted; a run writes some 5,000 bytes and 6 levels."""


def read_saved(file: Path) -> Node:
    """Read a saved configuration. Nothing in it is resolved, expanded or built.

    Raises:
        ValueError: the file has something other than plain values (an interpolation, an alias, a tag), is too long or
            too deep, or is not a YAML mapping.
    """
    try:
        if not file.is_file():
            raise ValueError("no such file")
        with file.open("rb") as stream:
            data = stream.read(LONGEST + 1)
        if len(data) > LONGEST:
            raise ValueError(f"more than {LONGEST:,} bytes")
        text = data.decode("utf-8")
        _check_events(text)
        # OmegaConf reads numbers as it writes them, which differs from PyYAML.
        config = OmegaConf.create(text)
        if not isinstance(config, DictConfig):
            raise ValueError("no mapping")
        return cast("Node", OmegaConf.to_container(config, resolve=False))
    except (ValueError, OSError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{file}: expected a run's configuration, found {error}") from error


def _check_events(text: str) -> None:
    # Checked before values are built: what an alias or an interpolation stands for may be large, or a user's secret.
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        line = f"line {event.start_mark.line + 1}"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels in {line}")
        # An anchor belongs to an alias, or to the node that an alias stands for.
        if getattr(event, "anchor", None) is not None:
            raise ValueError(f"an anchor or alias in {line}; write the values themselves")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"a tag in {line}; write plain values")
        if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            raise ValueError(f"an interpolation in {line}, {event.value[:80]!r}; write its value")
