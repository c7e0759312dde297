"""Keys that users name themselves: the variables of a chat template."""

from __future__ import annotations

from collections.abc import Sequence

OPEN = "model.chat_template_kwargs."
"""The beginning of keys below which the configuration takes any name."""


def opened(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with Hydra's ``++`` before keys that the configuration need not have."""
    return [f"++{word}" if word.startswith(OPEN) else word for word in words]
