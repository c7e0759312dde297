"""Typed reading of a row's fields. Each error names the location, the field, what was expected and what was found."""

import json
import re
from collections.abc import Mapping
from itertools import chain, islice
from reprlib import Repr
from typing import Any

from halos.data.records.record import MESSAGE_ROLES, Message, Reply, json_text

RawRow = Mapping[str, object]
"""A row as it was read from a file."""

TEMPLATE_FIELDS = frozenset(
    [
        *("tool_calls", "tool_call_id", "tool_responses", "tool_plan", "tools", "function_call", "name", "recipient"),
        *("reasoning_content", "reasoning", "thinking", "citations", "metadata", "prefix"),
    ]
)
"""Fields of messages, beside role and content, that chat templates of published models read."""
MODALITIES = ("image", "images", "video", "videos", "audio", "audios")
"""Columns, and fields of messages, that hold what halos cannot train on."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
"""A number that is written as text."""

DEEPEST = 100
"""Levels of lists and objects in JSON, far more than descriptions of tools have."""
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
    value = row.get(key)
    if value is not None:
        return value
    # Two errors, as null points to a value that is missing in this row and no key to a wrong format.
    if key in row:
        raise wrong(where, key, "given", None)
    raise ValueError(f"{where}: expected the key {key!r}; found {keys_of(row)}")


def text_of(where: str, name: str, value: object) -> str:
    """Return a text; raise ``ValueError`` for another value, or for a text that is not valid Unicode."""
    if not isinstance(value, str):
        raise wrong(where, name, "a text", value)
    if not _is_unicode(value):
        raise wrong(where, name, "valid Unicode", value)
    return value


def _is_unicode(text: str) -> bool:
    """Return whether a text is valid; half of a surrogate pair, which JSON can have, is accepted by no tokenizer."""
    if text.isascii():  # as most texts are; encoding would copy a huge one
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def messages_of(where: str, name: str, value: object) -> tuple[Message, ...]:
    """Return the turns in a list of messages."""
    if not isinstance(value, list) or not value:
        raise wrong(where, name, "a list of messages with 'role' and 'content'", value)
    return tuple([_plain_message(item) or _message(where, f"{name}[{i}]", item) for i, item in enumerate(value)])


def _plain_message(value: object) -> Message | None:
    """Return a message with a role and a text, as most have nothing else; None for another value."""
    if not isinstance(value, dict) or len(value) != 2:
        return None
    role, content = value.get("role"), value.get("content")
    # Errors are left to the reader of all messages: their places are texts that would be made for every message.
    return (
        Message(role, content) if role in MESSAGE_ROLES and isinstance(content, str) and _is_unicode(content) else None
    )


def _message(where: str, name: str, value: object) -> Message:
    if not isinstance(value, dict) or value.get("role") is None:
        raise wrong(where, name, "a message with 'role' and 'content'", value)
    role, content = value["role"], value.get("content")
    if role not in MESSAGE_ROLES:
        is_name = isinstance(role, str) and len(role) <= 40 and role.isidentifier()
        hint = f" (of another name: data.roles.{role}=user)" if is_name else ""
        raise wrong(where, f"{name}.role", f"one of {', '.join(MESSAGE_ROLES)}{hint}", role)
    fields = _fields(where, name, value)
    if content is None and fields and role == "assistant":
        content = ""  # a turn may be a tool call alone; servers pass the template an empty text
    elif "content" not in value:
        raise wrong(where, name, "a message with 'role' and 'content'", value)
    return Message(role, content_of(where, f"{name}.content", content), fields, _weight(where, name, role, value))


def _fields(where: str, name: str, value: dict[str, object]) -> str:
    check_text_alone(where, value, f"{name}.")
    fields = without_null({field: value[field] for field in TEMPLATE_FIELDS.intersection(value)})
    if calls := fields.get("tool_calls"):
        fields["tool_calls"] = _calls(where, f"{name}.tool_calls", calls)
    # An empty list is what a table has where another message has calls.
    return json_of(where, name, {field: item for field, item in fields.items() if item not in ([], {})})


def check_text_alone(where: str, row: Mapping[str, object], prefix: str = "") -> None:
    """Raise ``ValueError`` if a row or a message has images, videos or audio."""
    for name in MODALITIES:
        if row.get(name):
            raise wrong(where, f"{prefix}{name}", "empty, as halos trains on text alone", row[name])


def content_of(where: str, name: str, value: object) -> str:
    """Return the text of a message's content: a text, or parts of text, which are joined."""
    if not isinstance(value, list):
        return text_of(where, name, value)
    return "".join(_part(where, f"{name}[{i}]", part) for i, part in enumerate(value))


def _part(where: str, name: str, part: object) -> str:
    if isinstance(part, str):
        return text_of(where, name, part)
    if not isinstance(part, dict) or not has(part, "type"):
        raise wrong(where, name, "a part with 'type' and 'text'", part)
    if part["type"] != "text":
        raise wrong(where, f"{name}.type", "'text', as halos trains on text alone", part["type"])
    return text_of(where, f"{name}.text", part.get("text"))


def _calls(where: str, name: str, value: object) -> list[object]:
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise wrong(where, name, "a list of tool calls", value)
    return [_call(call) for call in value]


def _call(call: dict[str, object]) -> dict[str, object]:
    """Return a tool call with its arguments as an object: servers parse them before the template writes them."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}  # type: ignore[arg-type]
    try:
        arguments = json.loads(call["arguments"])  # type: ignore[arg-type]
        check_depth(arguments, str(call["arguments"]))
    except (KeyError, TypeError, ValueError, RecursionError):  # absent, an object, or what a model wrote wrongly
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def check_depth(value: object, text: str, start: int = 0, stop: int | None = None) -> None:
    """Raise ``ValueError`` for JSON of more than :data:`DEEPEST` levels, in which other code would run out of stack.

    Args:
        value: what was parsed.
        text: holds its JSON.
        start: where the JSON begins.
        stop: where it ends; None: at the end of the text.
    """
    # Most rows have no more brackets than that.
    if not isinstance(value, dict | list) or text.count("[", start, stop) + text.count("{", start, stop) <= DEEPEST:
        return
    level = [value]
    for _ in range(DEEPEST):
        items = chain.from_iterable(item.values() if isinstance(item, dict) else item for item in level)
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(f"more than {DEEPEST} levels of lists and objects")


def without_null(value: object) -> Any:
    """Return a value without the null fields of its objects: a table has them where another row has a value."""
    if isinstance(value, dict):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list) else value


def json_of(where: str, name: str, value: dict[str, object] | list[object]) -> str:
    """Return what :func:`.json_text` makes of a value; raise ``ValueError`` if JSON does not have it."""
    try:
        return text_of(where, name, json_text(value))
    except (TypeError, ValueError, RecursionError):  # dates and bytes of tables, infinities, halves of surrogates
        raise wrong(where, name, "valid JSON", value) from None


def _weight(where: str, name: str, role: str, message: Mapping[str, object]) -> int:
    value = message.get("weight")
    if value is None:
        return 1
    if not isinstance(value, int | float) or value not in (0, 1):
        raise wrong(where, f"{name}.weight", "0 (the turn is not trained on) or 1", value)
    if value and role != "assistant":
        raise wrong(where, f"{name}.weight", f"0 or absent, as a {role} turn is never trained on", value)
    return int(value)


def prompt_of(where: str, row: RawRow, key: str = "prompt") -> str | tuple[Message, ...]:
    """Return a prompt, a text or turns; raise ``ValueError`` for an empty one."""
    prompt = _text_or_messages(where, row, key)
    if _is_blank(prompt):
        raise wrong(where, key, "a prompt that is not empty", row[key])
    return prompt


def _text_or_messages(where: str, row: RawRow, key: str) -> str | tuple[Message, ...]:
    value = required(where, row, key)
    if not isinstance(value, str | list):
        raise wrong(where, key, "a text or a list of messages", value)
    return text_of(where, key, value) if isinstance(value, str) else messages_of(where, key, value)


def _is_blank(prompt: str | tuple[Message, ...]) -> bool:
    if isinstance(prompt, str):
        return not prompt.strip()
    return not any(message.text.strip() for message in prompt)


def reply_of(where: str, row: RawRow, key: str) -> tuple[tuple[Message, ...], Reply]:
    """Return (the turns before a completion in its own field, the completion); a plain text has no turns before it."""
    reply = _text_or_messages(where, row, key)
    if isinstance(reply, str):
        return (), reply
    *before, last = reply
    place = f"{key}[{len(before)}]"
    if last.role != "assistant":
        raise wrong(where, f"{place}.role", "assistant, as the last turn is the completion", last.role)
    if not last.weight:
        raise wrong(where, f"{place}.weight", "1, as the last turn is the completion; cut the turns after it", 0)
    if before and _is_blank(tuple(before)):
        raise wrong(where, key, "a conversation whose prompt is not empty", row[key])
    return tuple(before), (last,) if last.fields else last.content


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
