"""Finds mistakes in a command line before Hydra parses it by its own grammar."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

_WITH_VALUE = re.compile(r"-c|--cfg|-p|--package|-i|--info|-cp|--config-path|-cn|--config-name|-cd|--config-dir")
_FLAGS = re.compile(
    r"-h|--help|--hydra-help|--version|-r|--resolve|--run|-m|--multirun|-sc|--shell-completion|--experimental-rerun.*"
    rf"|({_WITH_VALUE.pattern})(=.*)?"
)
RENAMED = {"checkpoint_every": "checkpoint.every"}
"""Keys that people know from other projects, and their names here."""


def without_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide words into settings, and flags with their values.

    Hydra must get all settings in a row: its argparse refuses settings on both sides of a flag.
    """
    settings: list[str] = []
    flags: list[str] = []
    is_value = False
    for word in words:
        is_flag = word.startswith("-")
        (flags if is_flag or is_value else settings).append(word)
        is_value = is_flag and _WITH_VALUE.fullmatch(word) is not None
    return settings, flags


def check_words(words: Sequence[str]) -> None:
    """Check the words of a command line.

    Raises:
        ValueError: a flag that does not exist (``--loss kto``), spaces around ``=``, a word without ``=``, a key under
            another project's name, or a value that needs quotes. The error says what to write.
    """
    pairs = list(zip(words, [*words[1:], ""], strict=False))  # a last word is followed by none
    is_value = False
    for n, (word, following) in enumerate(pairs):
        if is_value:
            is_value = False
        elif word.startswith("-"):
            if not _FLAGS.fullmatch(word):
                name, _, value = word.lstrip("-").partition("=")
                value = value or ("VALUE" if following.startswith("-") else following or "VALUE")
                raise ValueError(f"{word}: expected key=value without dashes, found a flag; write {name}={value}")
            is_value = _WITH_VALUE.fullmatch(word) is not None
        else:
            key, _, value = word.partition("=")
            if (renamed := RENAMED.get(key.lstrip("+"))) is not None:
                raise ValueError(f"{key}: expected {renamed}, found another name of it; write {renamed}={value}")
            _check_spaces(word, [other for _, other in pairs[n : n + 2]])
            _check_grammar(word)


def _check_spaces(word: str, following: Sequence[str]) -> None:
    key = word.rstrip("=")
    rest = next((other.lstrip("=") for other in following if other.strip("=")), "VALUE")
    if following[0].startswith("=") or (word.endswith("=") and following[0] and "=" not in following[0]):
        raise ValueError(f"{word} {following[0]}: expected no spaces around =; write {key}={rest}")
    if "=" not in word and not word.startswith("~"):
        raise ValueError(f"{word}: expected group=option or key=value, found no =")


def _check_grammar(word: str) -> None:
    parser = OverridesParser.create()
    try:
        parser.parse_override(word)
    except HydraException:
        key, _, value = word.partition("=")
        quoted = '{}="{}"'.format(key, value.replace('"', '\\"'))
        try:
            if parser.parse_override(quoted).value() != value:
                return
        except HydraException:
            return  # the key is at fault: Hydra's own error names it
        raise ValueError(
            f"{word}: expected a value in Hydra's grammar, found characters with a meaning of their own there; "
            f"quote the text: {_in_shell(quoted)}"
        ) from None


def _in_shell(word: str) -> str:
    return "'{}'".format(word.replace("'", "'\\''"))
