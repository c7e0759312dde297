"""Turns errors in the configuration into one line for the user."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from halos.config.signatures import did_you_mean

NAMES_OF_FILES = ("data.columns.", "data.roles.")
"""Keys whose values are names in the user's files."""

FORMATS = ("csv", "tsv", "json", "jsonl", "xlsx", "excel", "parquet", "alpaca", "sharegpt", "openai")
"""Options that people may expect, for layouts that ``data=files`` recognises by itself."""


def require_plain_booleans(node: object, key: str = "") -> None:
    """Raise ``ValueError`` for a key that is set to yes, no, on or off.

    Hydra reads these as strings, and a non-empty string counts as true. Names from the user's data are exempt.

    Args:
        node: plain containers of the configuration.
        key: the node's own key.
    """
    if isinstance(node, dict):
        for name, value in node.items():
            require_plain_booleans(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, str) and node.lower() in ("yes", "no", "on", "off") and not key.startswith(NAMES_OF_FILES):
        raise ValueError(f"{key}: expected true or false, found {node!r}")


def check_complete(cfg: DictConfig) -> None:
    """Raise ``ValueError`` for a key that has no value, and for booleans as in :func:`require_plain_booleans`."""
    if missing := sorted(map(str, OmegaConf.missing_keys(cfg))):
        raise ValueError(f"{missing[0]}: expected a value, found none; set {missing[0]}")
    require_plain_booleans(OmegaConf.to_container(cfg))


def no_such_option(group: str, name: str, options: Sequence[str]) -> str:
    """Return the error line for a name that is not an option of its group."""
    is_format = group == "data" and name.lower() in FORMATS
    hint = f"; data=files reads {name} files, and data.train=FILE implies it" if is_format else ""
    return f"{group}={name}: no such option{did_you_mean(name, options)}; expected one of {', '.join(options)}{hint}"


def explain(error: BaseException) -> str:
    """Return one line for an error in the configuration, with names that are close to a misspelt one."""
    # Hydra's own message has a line for each option and for each folder of the search path.
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return no_such_option(group, name, error.options)
    for cause in _chain(error):
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.parent_node is not None:
            key = str(cause.full_key or cause.key)
            names = [str(name) for name in cause.parent_node]
            target = str(cause.parent_node.get("_target_") or "") if isinstance(cause.parent_node, DictConfig) else ""
            outside_halos = bool(target) and not target.startswith("halos.")
            hint = f"; write +{key}=… for a parameter of {target}" if outside_halos else ""
            return f"{key}: no such key{did_you_mean(key.rpartition('.')[2], names)}{hint}"
    # Hydra wraps an error of OmegaConf or of a parser in another one, which only says where it happened.
    last = [cause for cause in _chain(error) if not isinstance(cause, ConfigCompositionException)]
    return " ".join(str(last[-1] if last else error).split())


def _chain(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__
    return chain
