"""Errors in the configuration, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError


def require_plain_booleans(node: Any, key: str = "") -> None:
    """Raise ``ValueError`` for a key that is set to yes, no, on or off: to Hydra these are texts, and a text is true.

    The names of the data's own columns may be any.
    """
    if isinstance(node, dict):
        for name, value in node.items():
            require_plain_booleans(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, str) and node.lower() in ("yes", "no", "on", "off") and not key.startswith("data.columns."):
        raise ValueError(f"{key}: expected true or false, found {node!r}")


def explain(error: BaseException) -> str:
    """One line for an error in the configuration, with names that come near a misspelt one."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: no such option{_near(name, error.options)}; expected one of {', '.join(error.options)}"
    for cause in _chain(error):
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.parent_node is not None:
            key = str(cause.full_key or cause.key)
            names = [str(name) for name in cause.parent_node]
            return f"{key}: no such key{_near(key.rpartition('.')[2], names)}"
    last = [cause for cause in _chain(error) if not isinstance(cause, ConfigCompositionException)]
    return " ".join(str(last[-1] if last else error).split())


def _near(name: str, names: Sequence[str]) -> str:
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _chain(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__
    return chain
