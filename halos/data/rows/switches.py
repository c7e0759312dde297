"""The variables with which chat templates switch reasoning on and off, and which value helps where one is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import product

SWITCHES = ("enable_thinking", "thinking")


def reads(template: str, name: str) -> bool:
    """Whether a template reads a variable of this name; a field (``turn.thinking``) or a quoted text does not count."""
    return re.search(rf"(?<![\w.'\"]){re.escape(name)}(?![\w'\"])", template) is not None


def helpful_value(template: str, helps: Callable[[Mapping[str, bool]], bool]) -> str:
    """Return the key that gives a switch the first value that helps, or nothing.

    Args:
        template: the text of the template.
        helps: whether rendering with these values succeeds; an error means no.
    """
    for name, value in product(SWITCHES, (False, True)):
        if reads(template, name):
            with suppress(ValueError):
                if helps({name: value}):
                    return f"model.chat_template_kwargs.{name}={str(value).lower()}"
    return ""
