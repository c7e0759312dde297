"""Reads the keys, defaults and comments of the YAML files in ``conf/``, for ``--help`` and the documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w-]+):(?: (?P<value>[^ ].*?))?(?:  # (?P<comment>.*))?$")
HIDDEN = ("defaults", "hydra", "_target_", "_partial_", "override")
"""Keys that are Hydra's own."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a YAML file with its default and its comment."""

    name: str
    default: str
    comment: str


def keys(file: Path, prefix: str = "") -> list[Key]:
    """Return the keys of a file in their order; a key of a section only if it has a comment.

    Args:
        file: a YAML file of ``conf/``, indented by two spaces.
        prefix: the group of the file, which is put before its keys unless the file is global.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    if lines[:1] == ["# @package _global_"]:
        prefix = ""
    file_keys, path = list[Key](), list[str]()
    for match in filter(None, map(LINE.match, lines)):
        depth = len(match["indent"]) // 2
        path = [*path[:depth], match["key"]]
        if any(part in HIDDEN for part in path):
            continue
        default, comment = match["value"] or "", match["comment"] or ""
        if default or comment:
            file_keys.append(Key(".".join(filter(None, (prefix, *path))), default, comment))
    return file_keys


def keys_with_bases(file: Path, prefix: str = "") -> list[Key]:
    """Return the keys of the files in a file's defaults list, in their order, followed by its own keys."""
    base_keys: list[Key] = []
    for base in defaults(file):
        if isinstance(base, str) and base != "_self_":
            name, _, package = base.partition("@")  # default@model: its keys lie below model
            base_keys += keys_with_bases(file.with_name(f"{name}.yaml"), package or prefix)
    return [*base_keys, *keys(file, prefix)]


def defaults(file: Path) -> list[object]:
    """Return a file's defaults list (Hydra's): the files that it is composed of."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    listed = content.get("defaults", []) if isinstance(content, dict) else []
    assert isinstance(listed, list)
    return listed


def header(file: Path) -> str:
    """Return the comment at the start of a file, as one text."""
    comment: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comment.append(line.lstrip("# ").strip())
    return " ".join(comment)
