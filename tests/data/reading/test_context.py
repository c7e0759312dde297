"""The system text, tools and template variables of a row; other modalities are refused by name."""

from typing import Any

import pytest

from halos.data.reading.context import in_context
from halos.data.records.record import Conversation, Message, Prompt

USER, SYSTEM = Message("user", "q"), Message("system", "s")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"b": {"default": None}, "a": {}}}}
# Keys keep the order of the data, in which templates write them; nulls, which a table may have put in, are left out.
TOOLS = '[{"type": "function", "function": {"name": "f", "parameters": {"b": {}, "a": {}}}}]'
AS_TEXT = '[{"name": "f", "default": null}]'


@pytest.mark.parametrize(
    ("row", "prompt", "expected"),
    [
        ({}, "q", "q"),
        ({"system": "s"}, "q", (SYSTEM, USER)),
        ({"system": "s"}, (USER,), (SYSTEM, USER)),
        ({"system": " s\n"}, (SYSTEM, USER), (SYSTEM, USER)),
        ({"system": " \n"}, "q", "q"),
        ({"system": None, "tools": None, "chat_template_kwargs": None, "images": None}, "q", "q"),
        ({"tools": [], "chat_template_kwargs": {}, "images": [], "audio": ""}, "q", "q"),
        ({"tools": "[]", "chat_template_kwargs": " "}, "q", "q"),
        ({"tools": [TOOL]}, "q", Conversation((USER,), TOOLS)),
        ({"tools": AS_TEXT, "system": "s"}, (USER,), Conversation((SYSTEM, USER), AS_TEXT)),
        ({"chat_template_kwargs": {"b": False, "a": None}}, "q", Conversation((USER,), "", '{"b": false}')),
        ({"chat_template_kwargs": '{"b": 1, "a": "é"}'}, "q", Conversation((USER,), "", '{"a": "é", "b": 1}')),
    ],
)
def test_what_a_row_has_beside_its_prompt(row: dict[str, Any], prompt: Prompt, expected: Prompt) -> None:
    assert in_context("f:3", row, prompt) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"system": ["s"]}, "expected 'system' to be a text; found"),
        ({"system": "other"}, "expected 'system' to be the text of the prompt's system turn, or absent; found 'other'"),
        ({"tools": {"name": "f"}}, "expected 'tools' to be a list of objects, or a JSON text of one; found"),
        ({"tools": ["f"]}, "expected 'tools' to be a list of objects"),
        ({"tools": '"f"'}, "expected 'tools' to be a list of objects"),
        ({"tools": "f()"}, "tools: expected JSON, found an error at column 1"),
        ({"tools": [{"name": b"f"}]}, "expected 'tools' to be valid JSON"),
        ({"chat_template_kwargs": [1]}, "expected 'chat_template_kwargs' to be an object, or a JSON text of one"),
        ({"chat_template_kwargs": {"tools": [1]}}, "expected 'chat_template_kwargs' to be without 'tools', which"),
        ({"image": {"path": "a.png"}}, "expected 'image' to be empty, as halos trains on text alone; found"),
        ({"images": ["a.png"]}, "expected 'images' to be empty, as halos trains on text alone; found"),
        ({"videos": ["a"]}, "expected 'videos' to be empty"),
        ({"audio": "a.wav"}, "expected 'audio' to be empty"),
    ],
)
def test_what_is_refused(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^f:3: {expected}"):
        in_context("f:3", row, (SYSTEM, USER))
