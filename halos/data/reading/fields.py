"""Typed reading of a row's fields. Each error names the location, the field, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from reprlib import Repr

from halos.data.records.record import ROLES, Message, Prompt

RawRow = Mapping[str, object]
"""A row as it was read from a file."""

LABELS = {"desirable": True, "undesirable": False}

MAX_KEYS = 20
"""Keys of a row that an error lists."""
SHORT = Repr()  # unlike repr, never copies all of a huge value
SHORT.maxstring = SHORT.maxother = 100
SHORT.maxlist = SHORT.maxdict = 20


def wrong(where: str, name: str, expected: str, value: object) -> ValueError:
    """Return the error for a field with a wrong value."""
    return ValueError(f"{where}: expected {name!r} to be {expected}; found {shorten(value)}")


def shorten(value: object) -> str:
    """Return a value as an error shows it: on one line, and shortened if it is long."""
    shown = SHORT.repr(value) if isinstance(value, str | list | dict) else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def keys_of(row: Mapping[str, object]) -> str:
    """Return the keys of a row as an error lists them."""
    names = [shorten(key) for key in islice(row, MAX_KEYS)]
    return ", ".join(names + ["..."] * (len(row) > MAX_KEYS)) or "an empty row"


def has(row: Mapping[str, object], key: str) -> bool:
    """Return whether the row has a value for ``key``; Parquet has null where a row lacks the field."""
    return row.get(key) is not None


def required(where: str, row: Mapping[str, object], key: str) -> object:
    """Return a value; raise ``ValueError`` where there is none."""
    # Two errors, as null points to a value that is missing in this row and no key to a wrong format.
    if key in row and row[key] is None:
        raise wrong(where, key, "given", None)
    if key not in row:
        raise ValueError(f"{where}: expected the key {key!r}; found {keys_of(row)}")
    return row[key]


def text_of(where: str, name: str, value: object) -> str:
    """Return a text; raise ``ValueError`` for another value, or for a text that is not valid Unicode."""
    if not isinstance(value, str):
        raise wrong(where, name, "a text", value)
    if value.isascii():  # as most texts are; encoding would copy a huge one
        return value
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair (\ud83d alone), which no tokenizer accepts
        raise wrong(where, name, "valid Unicode", value) from None
    return value


def messages_of(where: str, name: str, value: object) -> tuple[Message, ...]:
    """Return the turns in a list of messages."""
    if not isinstance(value, list) or not value:
        raise wrong(where, name, "a list of messages with 'role' and 'content'", value)
    return tuple(_message(where, f"{name}[{i}]", item) for i, item in enumerate(value))


def _message(where: str, name: str, value: object) -> Message:
    if not isinstance(value, dict) or not has(value, "role") or "content" not in value:
        raise wrong(where, name, "a message with 'role' and 'content'", value)
    if value["role"] not in ROLES:
        raise wrong(where, f"{name}.role", f"one of {', '.join(ROLES)}", value["role"])
    # Parquet has "tool_calls": null in every message of a column where one message has calls. Real calls are refused:
    # ignoring them would lose what the assistant did.
    if value.get("tool_calls"):
        raise wrong(where, f"{name}.tool_calls", "absent, calls go into the content", value["tool_calls"])
    return Message(value["role"], text_of(where, f"{name}.content", value["content"]))


def prompt_of(where: str, row: RawRow, key: str = "prompt") -> Prompt:
    """Return a prompt, a text or turns; raise ``ValueError`` for an empty one."""
    prompt = _text_or_messages(where, row, key)
    if _is_blank(prompt):
        raise wrong(where, key, "a prompt that is not empty", row[key])
    return prompt


def _text_or_messages(where: str, row: RawRow, key: str) -> Prompt:
    value = required(where, row, key)
    if not isinstance(value, str | list):
        raise wrong(where, key, "a text or a list of messages", value)
    return text_of(where, key, value) if isinstance(value, str) else messages_of(where, key, value)


def _is_blank(prompt: Prompt) -> bool:
    contents = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    return not any(content.strip() for content in contents)


def reply_of(where: str, row: RawRow, key: str) -> tuple[tuple[Message, ...], str]:
    """Return (the turns before a completion in its own field, the completion); a plain text has no turns before it."""
    reply = _text_or_messages(where, row, key)
    if isinstance(reply, str):
        return (), reply
    *before, last = reply
    if last.role != "assistant":
        raise wrong(where, f"{key}[{len(before)}].role", "assistant, as the last turn is the completion", last.role)
    if before and _is_blank(tuple(before)):
        raise wrong(where, key, "a conversation whose prompt is not empty", row[key])
    return tuple(before), last.content


def label_of(where: str, name: str, value: object) -> bool:
    """Return a label."""
    # By type: 1.0 equals 1, but a float is a score in the wrong column.
    if type(value) in (bool, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in LABELS:
        return LABELS[value.lower()]
    raise wrong(where, name, "true/false, 0/1 or desirable/undesirable", value)


def preference_of(where: str, row: RawRow, key: str, first: str, second: str) -> tuple[tuple[int, int], ...]:
    """Return the preference between the two completions ``first`` and ``second`` of a row, by its label ``key``."""
    label = required(where, row, key)
    if type(label) not in (bool, int) or label not in (0, 1):
        raise wrong(where, key, f"1 ({first} is preferred) or 0 ({second} is)", label)
    return ((0, 1) if label else (1, 0),)


def score_of(where: str, name: str, value: object) -> float | None:
    """Return a score, None where there is none."""
    if value is None:
        return None
    # True is an int to Python, but a label in the wrong column to a user.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(where, name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        raise wrong(where, name, "a number that a float can hold", value) from None
