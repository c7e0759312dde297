"""Feedback records refuse what makes no sense, naming themselves."""

import dataclasses
import math
from typing import Any

import pytest

from halos.data.records.record import Completion, Message, Prompt, Record, messages_of, prompt_key

TWO = (Completion("a"), Completion("b"))


def test_a_record_holds_what_it_was_given() -> None:
    record = Record("f:1", "q", TWO, ((1, 0),))
    assert (record.prompt, record.completions, record.preferences) == ("q", TWO, ((1, 0),))


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Record("f:1", "q", TWO).prompt = "other"  # type: ignore[misc]


@pytest.mark.parametrize("completion", [Completion(""), Completion("a", True, -1.5), Completion("a", score=0.0)])
def test_any_finite_judgement_is_taken(completion: Completion) -> None:
    assert Record("f:1", "q", (completion,)).completions == (completion,)


@pytest.mark.parametrize(
    ("prompt", "completions", "preferences", "message"),
    [
        ("", TWO, (), "expected a prompt, found an empty one"),
        (" \n", TWO, (), "expected a prompt, found an empty one"),
        ((), TWO, (), "at least one message"),
        ((Message("robot", "q"),), TWO, (), "found 'robot'"),
        ((Message("user", "q"), Message("assistant", "a")), TWO, (), "move it into the completion"),
        ("q", (), (), "at least one completion"),
        ("q", (Completion("a", score=math.nan),), (), "finite score, found nan"),
        ("q", (Completion("a", score=math.inf),), (), "finite score, found inf"),
        ("q", TWO, ((0, 0),), r"found \(0, 0\)"),
        ("q", TWO, ((0, 2),), r"found \(0, 2\)"),
        ("q", TWO, ((0, 1), (-1, 0)), r"found \(-1, 0\)"),
    ],
)
def test_nonsense_is_refused_with_the_record_named(
    prompt: Any, completions: Any, preferences: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^f\.jsonl:7: .*{message}"):
        Record("f.jsonl:7", prompt, completions, preferences)


def test_a_text_and_a_lone_user_turn_are_the_same_prompt() -> None:
    assert prompt_key("q") == prompt_key((Message("user", "q"),))
    assert list(messages_of("q")) == [Message("user", "q")]


def test_prompts_that_differ_have_different_keys() -> None:
    prompts: list[Prompt] = [
        "q",
        "user q",
        (Message("system", "q"),),
        (Message("user", "q"), Message("user", "q")),
        (Message("system", ""), Message("user", "q")),
        (Message("user", "qq"),),
    ]
    assert len({prompt_key(prompt) for prompt in prompts}) == len(prompts)


def test_turns_come_back_as_they_are() -> None:
    turns = (Message("system", "s"), Message("user", "q"))
    assert messages_of(turns) == turns
