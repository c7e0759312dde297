"""What ``halos --help`` and ``halos COMMAND --help`` print: commands, groups, and keys with their comments."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from halos.config.folder import config_folder, options_of
from halos.config.yaml_comments import Key, defaults, keys_with_bases

WIDTH = 80
_INTERNAL = ("experiment", "tuned", "feedback", "world")
"""Groups whose files set keys of other groups."""

FIRST = ("loss", "data", "model")
MORE = """-m runs a sweep (loss=kto,dpo seed=0,1). --config-dir DIR adds your own YAML.
--cfg job prints the configuration and runs nothing."""
BASES = ("default", "file_source")
"""Files that other files of a group are based on; they are not options."""


def commands_help(meanings: Mapping[str, str]) -> str:
    """Return the list of commands, a line each."""
    width = max(map(len, meanings))
    return "\n".join(
        [
            "usage: halos COMMAND [group=option …] [key=value …]",
            "",
            *(f"  {name:<{width}}  {meaning}" for name, meaning in meanings.items()),
            "",
            "halos COMMAND --help lists its groups and keys. The first result: halos train",
        ]
    )


def command_help(name: str, meaning: str, config: str, words: Sequence[str]) -> str:
    """Return the help of one command.

    Args:
        name: the name of the command.
        meaning: what it does, in a line.
        config: the name of its YAML.
        words: the words of the command line. Keys are listed for the options that they choose.
    """
    conf = Path(config_folder())
    groups = _groups(conf / f"{config}.yaml")
    chosen = groups | {key: value for key, _, value in (word.partition("=") for word in words) if key in groups}
    lines = [f"usage: halos {name} [group=option …] [key=value …]", "", f"{meaning[0].upper()}{meaning[1:]}.", ""]
    lines += [f"Groups and their options (see halos {name} GROUP=OPTION --help)"]
    for group, option in chosen.items():
        options = [other for other in options_of(group) if other not in BASES or other == option]
        if options != [option]:
            lines += _wrapped(f"  {group}={option}", ", ".join(options))
    lines += ["", "Keys with their defaults"]
    for before, key in pairwise([None, *_all_keys(conf, config, chosen)]):
        assert key is not None
        if before and key.name.partition(".")[0] != before.name.partition(".")[0] and "." in key.name + before.name:
            lines.append("")
        lines += _wrapped(f"  {key.name}={key.default}", key.comment)
    return "\n".join([*lines, "", MORE])


def _groups(file: Path) -> dict[str, str]:
    """Return the groups of a command's YAML, each with the option that is its default."""
    groups: dict[str, str] = {}
    for entry in defaults(file):
        if isinstance(entry, str) and entry != "_self_":
            groups |= _groups(file.with_name(f"{entry}.yaml"))
        elif isinstance(entry, dict):
            groups |= {group: "null" if value is None else str(value) for group, value in entry.items()}
    shown = {group: option for group, option in groups.items() if options_of(group) and group not in _INTERNAL}
    return {group: shown[group] for group in sorted(shown, key=lambda group: group not in FIRST)}


def _all_keys(conf: Path, config: str, chosen: Mapping[str, str]) -> Iterator[Key]:
    keys_by_name = {key.name: key for key in keys_with_bases(conf / f"{config}.yaml")}
    for group, option in chosen.items():
        file = conf / group / f"{option}.yaml"
        if file.is_file():
            keys_by_name |= {key.name: key for key in keys_with_bases(file, group)}
    # An interpolation takes its value from another key.
    for key in keys_by_name.values():
        if not (key.name.startswith("data.source.") and "${" in key.default):
            yield key


def _wrapped(start: str, text: str) -> list[str]:
    if not text:
        return [start]
    if len(start) + 2 + len(text) <= WIDTH:
        return [f"{start}  {text}"]
    return [start, *textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]
