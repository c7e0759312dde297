"""Exports of applications whose rows nest: Open WebUI's ratings of messages, Label Studio's annotations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from halos.data.layouts.chats import ROLE_NAMES
from halos.data.layouts.values import Values, score_in
from halos.data.layouts.votes import VoteRule
from halos.data.reading.fields import RawRow, messages_of, text_of, wrong
from halos.data.records.adapted import FILTERED, NOTED, without_empty
from halos.data.records.record import Completion, Record

NOT_RATED = f"{FILTERED}chats without a rating"


def is_open_webui(row: RawRow) -> bool:
    """Return whether a row is a rating of a message in Open WebUI's export of feedback."""
    return isinstance(row.get("snapshot"), Mapping) and isinstance(row.get("data"), Mapping)


def open_webui_record(where: str, row: RawRow, values: Values, dropped: Counter[str]) -> Record | None:
    """Return the rated message as a labelled completion; the conversation before it is the prompt.

    Raises:
        ValueError: the message, or one before it, is missing.
    """
    rating = _at(row, "data", "rating")
    if rating is None:
        dropped[NOT_RATED] += 1
        return None
    messages = _at(row, "snapshot", "chat", "chat", "history", "messages")
    name = _at(row, "meta", "message_id")
    if not isinstance(messages, Mapping) or not isinstance(name, str) or name not in messages:
        raise wrong(where, "meta.message_id", "the id of a message in snapshot.chat.chat.history.messages", name)
    chain: list[object] = []
    seen: set[object] = set()
    while isinstance(name, str):
        message = messages.get(name)
        if not isinstance(message, Mapping) or name in seen:
            raise wrong(where, "parentId", "the id of another message", name)
        seen.add(name)
        role = message.get("role")
        chain.append(
            {"role": ROLE_NAMES.get(role, role) if isinstance(role, str) else role, "content": message.get("content")}
        )
        name = message.get("parentId")
    *before, reply = messages_of(where, "snapshot.chat.chat.history.messages", chain[::-1])
    if reply.role != "assistant" or not before:
        raise wrong(
            where,
            "meta.message_id",
            "a reply of the assistant with a message before it",
            _at(row, "meta", "message_id"),
        )
    completion = Completion(reply.content, values.label(where, "data.rating", rating))
    return without_empty(Record(where, tuple(before), (completion,)), dropped)


def is_label_studio(row: RawRow) -> bool:
    """Return whether a row is a task of Label Studio's export."""
    return isinstance(row.get("data"), Mapping) and isinstance(row.get("annotations"), list)


def label_studio_row(where: str, row: RawRow, votes: VoteRule, dropped: Counter[str]) -> RawRow | None:
    """Return a task as a row whose columns are those of its ``data``, with the annotators' judgement beside them.

    Pairwise choices become ``winner`` (``tie`` where the two most frequent ones do not decide) and perhaps ``weight``,
    choices of a label ``votes``, ratings ``score`` (their mean). A task that nobody has annotated is left out.

    Args:
        where: the location of the row.
        row: the row.
        votes: how the annotators' choices become one.
        dropped: receives counts of what is left out and of what is converted.

    Raises:
        ValueError: the annotations are not those of a comparison or of a rating.
    """
    annotations = row["annotations"]
    results = [r for a in (annotations if isinstance(annotations, list) else []) for r in _list(_at(a, "result"))]
    choices = [choice for r in results if isinstance(choice := _at(r, "value", "selected"), str)]
    ratings = [s for r in results if (s := score_in(where, "rating", _at(r, "value", "rating"))) is not None]
    labels = [text_of(where, "choices", c) for r in results for c in _list(_at(r, "value", "choices"))]
    data = row["data"] if isinstance(row["data"], Mapping) else {}
    if not results:
        dropped[f"{FILTERED}tasks without an annotation"] += 1
        return None
    judgement: dict[str, object] = {"votes": dict(Counter(labels))} if labels else {}
    if choices:
        (choice, most), second, *_ = [*Counter(choices).most_common(), ("", 0)]
        if second[1]:
            dropped[f"{NOTED}tasks whose annotators disagree"] += 1
        verdict = votes.verdict(most, second[1])
        judgement["winner"] = choice if verdict else "tie"
        if verdict and verdict[1] != 1:
            judgement["weight"] = verdict[1]
    if ratings:
        judgement["score"] = sum(ratings) / len(ratings)
    if not judgement:
        raise wrong(where, "annotations", "results with a selected side, a rating or choices", annotations)
    return {**data, **judgement}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _at(value: object, *keys: str) -> object:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
