"""The steps of a reply with their labels, as files write them: a list of objects with a text and a label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from halos.data.layouts.values import Values
from halos.data.reading.fields import shorten, text_of, wrong
from halos.data.records.adapted import NOTED
from halos.data.records.record import Reply, Step

TEXT_NAMES = ("text", "step", "content")
LABEL_NAMES = ("label", "desirable", "correct", "is_correct")
"""Keys of a step under which its text and its label are looked for."""
SILENT = f"{NOTED}steps without a label, or whose label says nothing (data.values.tie)"


def step_keys(value: object) -> tuple[str, str] | None:
    """Return the keys of the text and of the label in a list of steps; None for any other value."""
    first = value[0] if isinstance(value, list) and value else None
    if not isinstance(first, Mapping):
        return None
    text, label = (next((name for name in names if name in first), None) for names in (TEXT_NAMES, LABEL_NAMES))
    return (text, label) if text and label else None


def unused_fields(value: object) -> list[str]:
    """Return the keys in a list of steps that are neither the text nor the label."""
    keys = step_keys(value)
    if keys is None or not isinstance(value, list):
        return []
    return list(dict.fromkeys(str(name) for item in value if isinstance(item, Mapping) for name in {*item} - {*keys}))


def steps_of(
    where: str, name: str, value: object, values: Values, dropped: Counter[str], *, optional: bool = False
) -> tuple[str, tuple[Step, ...]]:
    """Return the reply that steps make up, and the steps.

    Args:
        where: the location of the row.
        name: the column of the steps.
        value: the steps.
        values: what the words of labels mean.
        dropped: receives counts of steps whose label says nothing.
        optional: whether a step may have no label.

    Raises:
        ValueError: they are not steps, or a step has no text or no label.
    """
    text_key, label_key = step_keys(value) or (TEXT_NAMES[0], LABEL_NAMES[0])
    expected = f"a list of objects with {text_key!r} and {label_key!r}, the steps of a reply"
    if not isinstance(value, list) or not value:
        raise wrong(where, name, expected, value)
    reply, steps = "", list[Step]()
    for n, item in enumerate(value):
        place = f"{name}[{n}]"
        if not isinstance(item, Mapping) or text_key not in item:
            raise wrong(where, place, f"an object with {text_key!r} and {label_key!r}", item)
        text = text_of(where, f"{place}.{text_key}", item[text_key])
        if not text:
            raise wrong(where, f"{place}.{text_key}", "a text that is not empty", text)
        reply += text
        steps.append(Step(len(reply), _label(where, f"{place}.{label_key}", item.get(label_key), values, optional)))
    if silent := sum(step.desirable is None for step in steps):
        dropped[SILENT] += silent
    return reply, tuple(steps)


def _label(where: str, name: str, value: object, values: Values, optional: bool) -> bool | None:
    if values.leaves_out(value) or (optional and value is None):
        return None
    return values.label(where, name, value)


def check_reply(where: str, name: str, joined: str, reply: Reply) -> None:
    """Raise ``ValueError`` unless the texts of the steps make up the reply."""
    if not isinstance(reply, str):
        raise ValueError(
            f"{where}: expected a reply that is a text with {name!r}, found one with turns or other fields"
        )
    if joined != reply:
        shorter = min(len(joined), len(reply))
        place = next((n for n in range(shorter) if joined[n] != reply[n]), shorter)
        there = f"{shorten(joined[place : place + 30])} instead of {shorten(reply[place : place + 30])}"
        raise ValueError(
            f"{where}: expected the texts in {name!r} to make up the completion, found {there} at character {place}; "
            "write line breaks and spaces into the steps too, or leave the completion out"
        )
