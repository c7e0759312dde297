"""Errors in the configuration, in one line."""

from __future__ import annotations

from typing import Any

from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from halos.config.signatures import did_you_mean


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
        options = ", ".join(error.options)
        return f"{group}={name}: no such option{did_you_mean(name, error.options)}; expected one of {options}"
    for cause in _chain(error):
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.parent_node is not None:
            key = str(cause.full_key or cause.key)
            names = [str(name) for name in cause.parent_node]
            return f"{key}: no such key{did_you_mean(key.rpartition('.')[2], names)}"
    last = [cause for cause in _chain(error) if not isinstance(cause, ConfigCompositionException)]
    return " ".join(str(last[-1] if last else error).split())


def _chain(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__
    return chain
