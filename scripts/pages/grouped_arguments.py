"""Griffe extension: ``chosen, rejected: log-ratios, [B]`` in a docstring becomes an entry for each name."""

from __future__ import annotations

import re
from typing import Any

import griffe

GROUP = re.compile(r"^(?P<indent> +)(?P<names>[a-z_]\w*(?:, [a-z_]\w*)+): (?P<text>.*)$")


def split(docstring: str) -> str:
    """Return the docstring with an entry for each name; continuation lines are repeated."""
    lines, result = docstring.splitlines(), list[str]()
    while lines:
        line = lines.pop(0)
        if (match := GROUP.match(line)) is None:
            result.append(line)
            continue
        more = list[str]()
        while lines and lines[0].startswith(match["indent"] + " "):
            more.append(lines.pop(0))
        for name in match["names"].split(", "):
            result += [f"{match['indent']}{name}: {match['text']}", *more]
    return "\n".join(result)


def on_instance(self: Any, *, obj: Any, **_: Any) -> None:
    """Split the groups of an object's docstring, when Griffe has read the object."""
    if obj.docstring is not None:
        obj.docstring.value = split(obj.docstring.value)


# Not a class statement: mypy checks this file where Griffe is not installed, too.
GroupedArguments = type("GroupedArguments", (griffe.Extension,), {"on_instance": on_instance})
