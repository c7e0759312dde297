"""Reading one field: exactly these values are accepted, and the error names place, field and value."""

from typing import Any

import pytest

from halos.data.reading.fields import messages_of, prompt_of, reply_of, required, score_of, text_of
from halos.data.records.record import Message

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


def test_scores() -> None:
    assert score_of("f:1", "score", None) is None
    assert score_of("f:1", "score", -2) == -2.0
    assert score_of("f:1", "score", 0.5) == 0.5


@pytest.mark.parametrize("value", [True, "1.0", [1], 10**400])
def test_no_scores(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^f:3: expected 'score' to be a number"):
        score_of("f:3", "score", value)


def test_messages_keep_their_order_and_text() -> None:
    assert messages_of("f:1", "m", [{**USER, "weight": None}, ASSISTANT]) == (
        Message("user", "q"),
        Message("assistant", "a"),
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], "expected 'm' to be a list of messages with 'role' and 'content'; found \\[\\]"),
        ("text", "expected 'm' to be a list of messages"),
        ([USER, "hi"], r"expected 'm\[1\]' to be a message with 'role' and 'content'; found 'hi'"),
        ([{"from": "human", "value": "q"}], r"expected 'm\[0\]' to be a message with 'role' and 'content'"),
        ([{"role": "human", "content": "q"}], r"expected 'm\[0\].role' to be one of system, user, .*; found 'human'"),
        ([{"role": ["user"], "content": "q"}], r"expected 'm\[0\].role' to be one of"),
        ([{"role": "user", "content": None}], r"expected 'm\[0\].content' to be a text; found None"),
        ([{"role": "user"}], r"expected 'm\[0\]' to be a message with 'role' and 'content'"),
        ([{**USER, "content": None, "name": "x"}], r"expected 'm\[0\].content' to be a text; found None"),
        ([{**USER, "content": {"text": "q"}}], r"expected 'm\[0\].content' to be a text; found"),
        ([{**USER, "content": [{"text": "q"}]}], r"expected 'm\[0\].content\[0\]' to be a part with 'type' and"),
        ([{**USER, "content": [{"type": "text"}]}], r"expected 'm\[0\].content\[0\].text' to be a text; found None"),
        (
            [{**USER, "content": ["q", {"type": "image", "image": "a.png"}]}],
            r"expected 'm\[0\].content\[1\].type' to be 'text', as halos trains on text alone; found 'image'$",
        ),
        ([{**USER, "images": ["a.png"]}], r"expected 'm\[0\].images' to be empty, as halos trains on text alone"),
        ([{**ASSISTANT, "tool_calls": [1]}], r"expected 'm\[0\].tool_calls' to be a list of tool calls; found \[1\]"),
        ([{**ASSISTANT, "tool_calls": {"a": 1}}], r"expected 'm\[0\].tool_calls' to be a list of tool calls"),
        ([{**ASSISTANT, "thinking": b"x"}], r"expected 'm\[0\]' to be valid JSON"),
        ([{**ASSISTANT, "thinking": "\ud83d"}], r"expected 'm\[0\]' to be valid JSON"),
        (
            [{**ASSISTANT, "weight": 0.5}],
            r"expected 'm\[0\].weight' to be 0 \(the turn is not trained on\) or 1",
        ),
        ([{**ASSISTANT, "weight": "1"}], r"expected 'm\[0\].weight' to be 0"),
        ([{**USER, "weight": 1}], r"expected 'm\[0\].weight' to be 0 or absent, as a user turn is never trained on"),
    ],
)
def test_no_messages(value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^f:3: {expected}"):
        messages_of("f:3", "m", value)


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "a", "image": None}, "b", {"type": "text", "text": " c"}]
    assert messages_of("f:1", "m", [{"role": "user", "content": parts}]) == (Message("user", "ab c"),)


def test_messages_keep_all_that_templates_read() -> None:
    call = {"id": "c1", "index": None, "function": {"name": "look_up", "arguments": '{"b": null, "a": "é"}'}}
    turns = [
        USER | {"name": "Ann", "timestamp": 3, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "found", "tool_call_id": "c1", "tool_calls": []},
        ASSISTANT | {"weight": 0},
        ASSISTANT | {"weight": 1.0},
    ]
    # As a server passes them to the template: arguments as an object, in its own order, the nulls of a table left out.
    function = {"name": "look_up", "arguments": {"b": None, "a": "é"}}
    asking = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    first, asks, answer, *last = messages_of("f:1", "m", turns)
    assert first.as_dict() == USER | {"name": "Ann"}
    assert asks.as_dict() == asking | {"tool_calls": [{"id": "c1", "function": function}]}
    assert list(asks.as_dict()["tool_calls"][0]["function"]["arguments"]) == ["b", "a"]  # type: ignore[index]
    assert answer.as_dict() == {"role": "tool", "content": "found", "tool_call_id": "c1"}
    assert last == [Message("assistant", "a", weight=0), Message("assistant", "a")]


@pytest.mark.parametrize("arguments", ["{not JSON", "[1]", {"a": 1}, 7])
def test_arguments_that_are_no_json_text_of_an_object_stay(arguments: Any) -> None:
    for call in ({"name": "f", "arguments": arguments}, {"function": {"name": "f", "arguments": arguments}}):
        (turn,) = messages_of("f:1", "m", [{"role": "assistant", "tool_calls": [call]}])
        assert turn.as_dict()["tool_calls"] == [call]


def test_the_order_of_fields_does_not_matter_and_that_inside_them_does() -> None:
    one, same, other = (
        messages_of("f:1", "m", [turn])
        for turn in (
            {"role": "assistant", "thinking": "t", "tool_calls": [{"name": "f", "id": "1"}]},
            {"tool_calls": [{"name": "f", "id": "1"}], "thinking": "t", "content": "", "role": "assistant"},
            {"role": "assistant", "thinking": "t", "tool_calls": [{"id": "1", "name": "f"}]},
        )
    )
    assert one == same != other


def test_replies() -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    assert reply_of("f:1", {"c": [USER, calls]}, "c") == ((Message("user", "q"),), messages_of("f:1", "c", [calls]))
    assert reply_of("f:1", {"c": " text"}, "c") == ((), " text")
    assert reply_of("f:1", {"c": [ASSISTANT]}, "c") == ((), "a")
    assert reply_of("f:1", {"c": [USER, ASSISTANT]}, "c") == ((Message("user", "q"),), "a")


def test_a_reply_is_the_assistants() -> None:
    with pytest.raises(ValueError, match=r"^f:3: expected 'c\[1\].role' to be assistant.*found 'user'"):
        reply_of("f:3", {"c": [ASSISTANT, USER]}, "c")
    with pytest.raises(ValueError, match=r"^f:3: expected 'c\[1\].weight' to be 1, as the last turn is the completion"):
        reply_of("f:3", {"c": [USER, {**ASSISTANT, "weight": 0}]}, "c")
    with pytest.raises(ValueError, match=r"^f:3: expected 'c' to be a conversation whose prompt is not empty"):
        reply_of("f:3", {"c": [{"role": "user", "content": " "}, ASSISTANT]}, "c")
    with pytest.raises(ValueError, match=r"^f:3: expected 'c' to be a text or a list of messages; found 7"):
        reply_of("f:3", {"c": 7}, "c")


@pytest.mark.parametrize("value", ["", " \n", [{"role": "user", "content": "\t"}]])
def test_an_empty_prompt(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^f:3: expected 'prompt' to be a prompt that is not empty"):
        prompt_of("f:3", {"prompt": value})


def test_missing_and_null_fields() -> None:
    with pytest.raises(ValueError, match=r"^f:3: expected the key 'a'; found 'b', 'c'$"):
        required("f:3", {"b": 1, "c": 2}, "a")
    with pytest.raises(ValueError, match=r"^f:3: expected 'a' to be given; found None$"):
        required("f:3", {"a": None}, "a")


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert text_of("f:1", "t", "\U0001f600") == "😀"
    with pytest.raises(ValueError, match=r"^f:3: expected 't' to be valid Unicode"):
        text_of("f:3", "t", "\ud83d")
