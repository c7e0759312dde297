"""Turns errors in the configuration into one line for the user."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError


def require_plain_booleans(node: object, key: str = "") -> None:
    """Raise ``ValueError`` for a key that is set to yes, no, on or off.

    Hydra reads these as strings, and a string that is not empty counts as true. Columns of the user's data may have
    such names.

    Args:
        node: plain containers of the configuration.
        key: the node's own key.
    """
    if isinstance(node, dict):
        for name, value in node.items():
            require_plain_booleans(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, str) and node.lower() in ("yes", "no", "on", "off") and not key.startswith("data.columns."):
        raise ValueError(f"{key}: expected true or false, found {node!r}")


def explain(error: BaseException) -> str:
    """Return one line for an error in the configuration, with names that are close to a misspelt one."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = ", ".join(error.options)
        return f"{group}={name}: no such option{close_names(name, error.options)}; expected one of {options}"
    for cause in _chain(error):
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.parent_node is not None:
            key = str(cause.full_key or cause.key)
            names = [str(name) for name in cause.parent_node]
            return f"{key}: no such key{close_names(key.rpartition('.')[2], names)}"
    # Hydra wraps an error of OmegaConf or of a parser in one that only says where it happened.
    last = [cause for cause in _chain(error) if not isinstance(cause, ConfigCompositionException)]
    return " ".join(str(last[-1] if last else error).split())


def close_names(name: str, names: Sequence[str]) -> str:
    """Return " (did you mean …?)" with the names that are close to a misspelt one, or nothing if none is."""
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _chain(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__
    return chain
