"""Reading one field: exactly these values are accepted, and the error names place, field and value."""

from typing import Any

import pytest

from halos.data.reading.fields import label_of, messages_of, prompt_of, reply_of, required, score_of, text_of
from halos.data.records.record import Message

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, True), (False, False), (1, True), (0, False), ("desirable", True), ("UNDESIRABLE", False)],
)
def test_labels(value: Any, expected: bool) -> None:
    assert label_of("f:1", "label", value) is expected


@pytest.mark.parametrize("value", ["maybe", "true", "1", "", 2, -1, 1.0, None, [], {}])
def test_anything_else_is_no_label(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^f:3: expected 'label' to be true/false, 0/1 or desirable/undesirable; found"
    ):
        label_of("f:3", "label", value)


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
        ([{"role": "user", "content": [{"type": "image"}]}], r"expected 'm\[0\].content' to be a text"),
        ([{**ASSISTANT, "tool_calls": [1]}], r"expected 'm\[0\].tool_calls' to be absent"),
    ],
)
def test_no_messages(value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^f:3: {expected}"):
        messages_of("f:3", "m", value)


def test_replies() -> None:
    assert reply_of("f:1", {"c": " text"}, "c") == ((), " text")
    assert reply_of("f:1", {"c": [ASSISTANT]}, "c") == ((), "a")
    assert reply_of("f:1", {"c": [USER, ASSISTANT]}, "c") == ((Message("user", "q"),), "a")


def test_a_reply_is_the_assistants() -> None:
    with pytest.raises(ValueError, match=r"^f:3: expected 'c\[1\].role' to be assistant.*found 'user'"):
        reply_of("f:3", {"c": [ASSISTANT, USER]}, "c")
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
