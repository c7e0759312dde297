"""Feedback records refuse what makes no sense, naming themselves."""

import dataclasses
import math
from typing import Any

import pytest

from halos.data.records.record import (
    Completion,
    Conversation,
    Message,
    Prompt,
    Record,
    Reply,
    conversation_key,
    json_text,
    messages_of,
    prompt_key,
    reply_key,
    reply_text,
    transcript,
    with_messages,
)

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
        (Conversation((), "[1]"), TWO, (), "at least one message"),
        (Conversation((Message("assistant", "a"),)), TWO, (), "move it into the completion"),
        ("q", (Completion.of((Message("user", "u"), Message("assistant", "a"))),), (), "begin and end with an assist"),
        ("q", (Completion.of((Message("assistant", "a"), Message("tool", "t"))),), (), "begin and end with an assist"),
        ("q", (Completion.of((Message("robot", "a", "{}"),)),), (), "found 'robot'"),
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
        (Message("user", "q", json_text({"name": "Ann"})),),
        (Message("user", "q", json_text({"name": "Bob"})),),
        Conversation((Message("user", "q"),), tools='[{"name": "f"}]'),
        Conversation((Message("user", "q"),), template_kwargs='[{"name": "f"}]'),
    ]
    assert len({prompt_key(prompt) for prompt in prompts}) == len(prompts)


def test_a_conversation_is_known_by_its_beginning_up_to_the_first_user_turn() -> None:
    user, more = (Message("user", "q"), Message("assistant", "a"), Message("user", "r")), Message("system", "s")
    same: list[Prompt] = ["q", user[:1], user]
    others: list[Prompt] = ["r", (more, *user), Conversation(user, tools='[{"name": "f"}]'), (more,)]
    assert len({conversation_key(prompt) for prompt in same}) == 1
    assert len({conversation_key(prompt) for prompt in (same[0], *others)}) == 1 + len(others)


def test_a_reply_begins_and_ends_with_a_turn_that_is_trained_on() -> None:
    said, unsaid, asked = Message("assistant", "a"), Message("assistant", "b", weight=0), Message("user", "q")
    Record("r", "p", (Completion.of((said, asked, unsaid, asked, said)),))
    for reply in ((unsaid, asked, said), (said, asked, unsaid)):
        with pytest.raises(ValueError, match=r"^r: expected a reply to begin and end with a turn of weight 1, found"):
            Record("r", "p", (Completion.of(reply),))


def test_weights_are_not_part_of_a_prompt() -> None:
    said, unsaid = ((Message("user", "q"), Message("assistant", "a", weight=w), Message("user", "r")) for w in (0, 1))
    assert prompt_key(said) == prompt_key(unsaid)


CALL = Message("assistant", "Let me see.", json_text({"tool_calls": [{"name": "f"}], "thinking": "é"}))


def test_a_lone_turn_without_fields_is_its_text() -> None:
    assert Completion.of((Message("assistant", "a"),), True) == Completion.of("a", True) == Completion("a", True)
    assert Completion("a").reply == "a"
    assert Completion.of((CALL,), score=1.0).reply == (CALL,)


def test_replies_that_differ_have_different_keys() -> None:
    replies: list[Reply] = [CALL.text, (CALL,), (Message("assistant", CALL.text), CALL), (CALL, CALL)]
    assert len({reply_key(reply) for reply in replies}) == len(replies)


def test_what_readers_and_judges_see() -> None:
    assert CALL.text == 'Let me see.\n{"thinking": "é", "tool_calls": [{"name": "f"}]}'
    turns = (Message("user", "q"), CALL, Message("tool", "found"))
    shown = f"user: q\n\nassistant: {CALL.text}\n\ntool: found"
    assert transcript(turns) == shown
    assert transcript(Conversation(turns, '[{"name": "f"}]')) == f'tools: [{{"name": "f"}}]\n\n{shown}'
    assert transcript("q") == "user: q"
    assert reply_text("a") == "a"
    assert reply_text((CALL,)) == CALL.text == Completion.of((CALL,)).text
    assert reply_text((CALL, *turns[2:], CALL)) == f"assistant: {CALL.text}\n\ntool: found\n\nassistant: {CALL.text}"


def test_other_turns_with_the_same_tools() -> None:
    turns = (Message("user", "q"),)
    assert with_messages("p", turns) == turns
    assert with_messages(Conversation((), "[1]", "{}"), turns) == Conversation(turns, "[1]", "{}")


def test_a_turn_as_a_template_takes_it() -> None:
    call = {"role": "assistant", "content": "Let me see.", "tool_calls": [{"name": "f"}], "thinking": "é"}
    assert CALL.as_dict() == call
    assert Message("user", "q").as_dict() == {"role": "user", "content": "q"}
    assert json_text({}) == json_text([]) == ""


def test_turns_come_back_as_they_are() -> None:
    turns = (Message("system", "s"), Message("user", "q"))
    assert messages_of(turns) == turns
