"""Rewrites words of a command line that contain a user's own names: new keys, and names that Hydra cannot read."""

from __future__ import annotations

import re
from collections.abc import Sequence

OPEN = ("model.chat_template_kwargs.", "data.roles.")
"""The beginnings of keys below which any name is allowed."""


NAMES = ("data.columns.", "data.values.", "data.roles.")
"""The beginnings of keys whose values are names and words from a user's files."""
READABLE = re.compile(r"[\w\s./\\+$%*@?|:,-]*", re.ASCII)
"""What Hydra's grammar reads without quotes."""


def opened(words: Sequence[str]) -> list[str]:
    """Return the words of a command line as Hydra reads them.

    Keys that the configuration need not have get Hydra's prefix ``++``. Names and words from a user's files get quotes
    if they have characters that its grammar reads only in quotes: ``data.columns.prompt=größe``,
    ``data.values.tie=[🤷]``.
    """
    return [f"++{word}" if word.startswith(OPEN) else word for word in map(_quoted, words)]


def _quoted(word: str) -> str:
    key, _, value = word.partition("=")
    if not key.startswith(NAMES) or READABLE.fullmatch(value) or re.search("['\"]", value):
        return word
    if value.startswith("[") and value.endswith("]"):
        return f"{key}=[{','.join(map(_quoted_name, value[1:-1].split(',')))}]"
    return f"{key}={_quoted_name(value)}"


def _quoted_name(name: str) -> str:
    return name if READABLE.fullmatch(name) else f"'{name}'"
