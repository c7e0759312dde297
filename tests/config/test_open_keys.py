"""Words about a user's own names, as they are typed in a shell."""

import re
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from halos.config.open_keys import opened
from halos.config.words import check_words
from halos.data.layouts.roles import declared
from halos.data.layouts.values import Values
from halos.data.layouts.votes import VoteRule

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
TYPED = re.findall(r"`(\"?'?data\.(?:columns|values|roles|votes|ties|transcripts|bad_rows)[^`…]*=[^`…]*)`", PAGE)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("data.columns.prompt=größe", "größe"),
        ("data.columns.prompt=User input", "User input"),
        ("data.columns.score=rating (1-5)", "rating (1-5)"),
        ("data.values.desirable=[👍,up,ja]", ["👍", "up", "ja"]),
        ("data.values.tie=['tie (both bad)','']", ["tie (both bad)", ""]),
        ("data.columns.sides=[a.0.b,c]", ["a.0.b", "c"]),
        ("data.roles.kunde=user", "user"),
        ("data.columns.prompt=Q&A", "Q&A"),
    ],
)
def test_names_are_read_as_they_are(word: str, value: object) -> None:
    (one,) = opened([word])
    check_words([one])
    assert OverridesParser.create().parse_override(one).value() == value


def test_other_words_stay() -> None:
    words = ["loss.beta=0.1", "data.train=größe.csv", "data.columns={prompt: q}", "data.values.tie=[a,b]"]
    assert opened(words) == words


@pytest.mark.parametrize("typed", TYPED)
def test_what_the_page_says_is_understood(typed: str) -> None:
    command = f"printf '%s\\n' {typed}"
    words = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words
    for one in map(OverridesParser.create().parse_override, opened(words)):
        key, value = one.key_or_group.removeprefix("data.").lstrip("+"), cast("Any", one.value())
        if key.startswith("columns."):
            declared({key.removeprefix("columns."): value})
        elif key.startswith("values."):
            Values(**{key.removeprefix("values."): value})
        elif key == "votes":
            VoteRule(value)


def test_the_page_has_words() -> None:
    assert len(TYPED) > 10
