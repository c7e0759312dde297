"""Docstrings as parts, and tables of Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Deviations from the papers?):$", re.MULTILINE)
ENTRY = re.compile(r"^    (?! )(.+?)(?:: |\. )", re.MULTILINE)
ROLE = re.compile(r":\w+:`[.~]*([^`]+)`")


def parts(thing: Any) -> dict[str, str]:
    """Split a docstring in Google style: the text before its sections under ``""``, then each section by name."""
    pieces = SECTION.split(inspect.getdoc(thing) or "")
    names = ["", *(name.partition(" ")[0] for name in pieces[1::2])]
    return {name: plain(text.strip("\n")) for name, text in zip(names, pieces[0::2], strict=True)}


def entries(section: str) -> dict[str, str]:
    """Return the entries of a section, such as ``beta: β, above 0.``, by their name or number."""
    pieces = ENTRY.split(section)
    return {
        name: " ".join(text.split())
        for names, text in zip(pieces[1::2], pieces[2::2], strict=True)
        for name in names.split(", ")  # "desirable_weight, undesirable_weight: λ_D and λ_U"
    }


def plain(text: str) -> str:
    """Return text of a docstring as Markdown: roles of Sphinx and double backticks become code."""
    return ROLE.sub(lambda match: f"`{match[1]}`", text).replace("``", "`")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table of Markdown; bars inside cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def page(*blocks: str | Sequence[str]) -> str:
    """Return a page from its blocks, which are texts or lines, with an empty line between two."""
    texts = [block if isinstance(block, str) else "\n".join(block) for block in blocks]
    return "\n\n".join(text.strip("\n") for text in texts if text) + "\n"
