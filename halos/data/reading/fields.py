"""Typed reading of one row's fields; each error says where, which field, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from reprlib import Repr
from typing import Any

from halos.data.records.record import ROLES, Message, Prompt

RawRow = Mapping[str, Any]

LABELS = {"desirable": True, "undesirable": False}

MOST_KEYS = 20
SHORT = Repr()  # never copies all of a huge value, as repr would
SHORT.maxstring = SHORT.maxother = 100
SHORT.maxlist = SHORT.maxdict = 20


def wrong(where: str, name: str, expected: str, found: Any) -> ValueError:
    """The error for a field with a wrong value."""
    return ValueError(f"{where}: expected {name!r} to be {expected}; found {shorten(found)}")


def shorten(value: Any) -> str:
    """A value as an error shows it: on one line, and not all of it where it is long."""
    shown = SHORT.repr(value) if isinstance(value, str | list | dict) else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def keys_of(row: RawRow) -> str:
    """The keys of a row, as an error lists them."""
    names = [shorten(key) for key in islice(row, MOST_KEYS)]
    return ", ".join(names + ["..."] * (len(row) > MOST_KEYS)) or "an empty row"


def has(row: RawRow, key: str) -> bool:
    """Whether the row says anything under ``key``: parquet writes null where a row has no such field."""
    return row.get(key) is not None


def required(where: str, row: RawRow, key: str) -> Any:
    if key in row and row[key] is None:
        raise wrong(where, key, "given", None)
    if key not in row:
        raise ValueError(f"{where}: expected the key {key!r}; found {keys_of(row)}")
    return row[key]


def text_of(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(where, name, "a text", value)
    if value.isascii():  # most are; encoding would copy a huge one
        return value
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair (\ud83d alone), which no tokenizer takes
        raise wrong(where, name, "valid Unicode", value) from None
    return value


def messages_of(where: str, name: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise wrong(where, name, "a list of messages with 'role' and 'content'", value)
    return tuple(_message(where, f"{name}[{i}]", item) for i, item in enumerate(value))


def _message(where: str, name: str, value: Any) -> Message:
    if not isinstance(value, dict) or not has(value, "role") or "content" not in value:
        raise wrong(where, name, "a message with 'role' and 'content'", value)
    if value["role"] not in ROLES:
        raise wrong(where, f"{name}.role", f"one of {', '.join(ROLES)}", value["role"])
    if value.get("tool_calls"):  # they would be lost without a word
        raise wrong(where, f"{name}.tool_calls", "absent, calls go into the content", value["tool_calls"])
    return Message(value["role"], text_of(where, f"{name}.content", value["content"]))


def prompt_of(where: str, row: RawRow, key: str = "prompt") -> Prompt:
    """A prompt: text or messages, not empty."""
    value = required(where, row, key)
    if not isinstance(value, str | list):
        raise wrong(where, key, "a text or a list of messages", value)
    prompt = text_of(where, key, value) if isinstance(value, str) else messages_of(where, key, value)
    if _is_blank(prompt):
        raise wrong(where, key, "a prompt that is not empty", value)
    return prompt


def _is_blank(prompt: Prompt) -> bool:
    said = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    return not any(part.strip() for part in said)


def reply_of(where: str, row: RawRow, key: str) -> tuple[tuple[Message, ...], str]:
    """The turns that stand before a completion in its own field (none for plain text), and the completion."""
    value = required(where, row, key)
    if not isinstance(value, str | list):
        raise wrong(where, key, "a text or a list of messages", value)
    if isinstance(value, str):
        return (), text_of(where, key, value)
    *before, last = messages_of(where, key, value)
    if last.role != "assistant":
        raise wrong(where, f"{key}[{len(before)}].role", "assistant, as the last turn is the completion", last.role)
    if before and _is_blank(tuple(before)):
        raise wrong(where, key, "a conversation whose prompt is not empty", value)
    return tuple(before), last.content


def label_of(where: str, name: str, value: Any) -> bool:
    if type(value) in (bool, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in LABELS:
        return LABELS[value.lower()]
    raise wrong(where, name, "true/false, 0/1 or desirable/undesirable", value)


def score_of(where: str, name: str, value: Any) -> float | None:
    """A score, None where there is none."""
    if value is None:
        return None
    if type(value) not in (int, float):
        raise wrong(where, name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        raise wrong(where, name, "a number that a float can hold", value) from None
