"""Nested configuration nodes as flat keys."""

from __future__ import annotations


def flatten(node: object, prefix: str = "") -> dict[str, object]:
    """Return the leaves of nested dictionaries by dotted keys: ``{"loss": {"beta": 0.1}}`` → ``{"loss.beta": 0.1}``.

    Lists and empty dictionaries are leaves.

    Args:
        node: plain containers, as ``OmegaConf.to_container`` returns them.
        prefix: key of the node itself.
    """
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    flat: dict[str, object] = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
