"""From rows with a list of replies to records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from halos.data.layouts.chats import chat_of
from halos.data.layouts.hints import missing_prompt
from halos.data.layouts.reader import Preferences, RowReader
from halos.data.layouts.roles import Path, value_at
from halos.data.layouts.steps import check_reply, steps_of
from halos.data.layouts.values import number_in, score_in
from halos.data.reading.fields import RawRow, has, messages_of, shorten, text_of, wrong
from halos.data.records.adapted import by_rank
from halos.data.records.record import Completion, Record, Reply

COMPLETION_KEYS = {"text", "messages", "desirable", "score", "steps"}


class ListReader(RowReader):
    """Reads rows with a list of replies, their scores, ranks, labels and preferences."""

    def _listed(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        path, items = self._required(where, row, "completions")
        item_name = self.roles.get("text")
        if not isinstance(items, list) or not items:
            raise wrong(where, path, "a list of objects with 'text'", items)
        prompt = self._prompt(where, row, dropped)
        if prompt is None:
            raise missing_prompt(where, row, self.roles)
        if path == "output" and item_name is None:
            texts = [text_of(where, f"{path}[{n}]", text) for n, text in enumerate(items)]
            record = Record(where, prompt, tuple(map(Completion, texts)), by_rank(range(len(texts))))
            return self._weighed(where, row, record, dropped)
        own_format = path == "completions" and item_name in (None, "text") and not isinstance(items[0], str)
        items = self._with_lists(where, row, path, items)
        completions = tuple(self._item(where, f"{path}[{n}]", item, own_format) for n, item in enumerate(items))
        if own_format:
            completions = tuple(
                self._with_steps(where, f"{path}[{n}].steps", one, item, dropped)
                for n, (one, item) in enumerate(zip(completions, items, strict=True))
            )
        preferences = _preferences(where, self._value(row, "preferences")) + self._by_rank(where, path, items)
        preferences += self._best_of(where, row, completions)
        record = Record(where, prompt, completions, preferences)
        name = self._value(row, "id")
        if own_format and name is not None:
            record_id = text_of(where, "id", name)
            if not record_id.strip():
                raise wrong(where, "id", "a name", name)
            # Only now: the errors of the record's own checks name the file and the line, which help more than its id.
            record = replace(record, id=record_id)
        return self._weighed(where, row, record, dropped)

    def _with_lists(self, where: str, row: RawRow, path: Path, items: Sequence[object]) -> list[object]:
        """Return texts as objects with what columns with a list say of each; other items as they are."""
        if not all(isinstance(item, str) for item in items):
            return list(items)
        objects: list[dict[str, object]] = [{self._key("text"): text} for text in items]
        for role in ("score", "rank", "label"):
            name = self.roles.get(role)
            if not isinstance(name, str):
                continue
            values = value_at(row, name)
            if not isinstance(values, list) or len(values) != len(items):
                raise wrong(
                    where, name, f"a list with one value for each of the {len(items)} texts in {path!r}", values
                )
            for item, value in zip(objects, values, strict=True):
                item[self._key(role)] = value
        return list(objects)

    def _key(self, role: str) -> Path:
        """Return the key, or the path, under which the items of a list have a role."""
        return str(self.roles.get(role, "desirable" if role == "label" else role))

    def _best_of(self, where: str, row: RawRow, completions: Sequence[Completion]) -> Preferences:
        """Return the preferences of the best of a list, named by its index from 0 or by its text, to all others."""
        if "winner" not in self.roles:
            return ()
        path, value = self._required(where, row, "winner")
        texts = [completion.text for completion in completions]
        number = number_in(value) if isinstance(value, str) and value not in texts else value
        best = texts.index(value) if value in texts else number
        if isinstance(best, bool) or not isinstance(best, int | float) or best not in range(len(texts)):
            raise wrong(where, path, f"the index of the best completion, 0 to {len(texts) - 1}, or its text", value)
        return tuple((int(best), other) for other in range(len(texts)) if other != best)

    def _item(self, where: str, name: str, item: object, own_format: bool) -> Completion:
        text = self._key("text")
        item_text = value_at(item, text) if isinstance(item, Mapping) else None
        if not isinstance(item, Mapping) or (item_text is not None) == (own_format and has(item, "messages")):
            raise wrong(where, name, f"an object with {text!r}" + (" or 'messages'" if own_format else ""), item)
        unknown = sorted(set(item) - COMPLETION_KEYS) if own_format and "rank" not in self.roles else []
        # A mistyped 'desirable' would otherwise pass for a completion without feedback.
        if unknown:
            raise ValueError(
                f"{where}: expected {name!r} to have 'text' (or 'messages'), 'desirable', 'score' and 'steps' only; "
                f"found {shorten(unknown[0])}"
            )
        place, value = (f"{name}.messages", item["messages"]) if item_text is None else (f"{name}.{text}", item_text)
        reply: Reply
        if item_text is not None and not isinstance(item_text, list | dict):
            reply = text_of(where, place, item_text)
        else:
            reply = messages_of(where, place, chat_of(value, self.role_names))
            if not reply[-1].weight:
                raise wrong(where, f"{place}[{len(reply) - 1}].weight", "1, as the last turn is judged", 0)
        label, score = (value_at(item, self._key(role)) for role in ("label", "score"))
        return Completion.of(
            reply,
            desirable=None if label is None else self.values.label(where, f"{name}.{self._key('label')}", label),
            score=score_in(where, f"{name}.{self._key('score')}", score),
        )

    def _with_steps(
        self, where: str, name: str, completion: Completion, item: object, dropped: Counter[str]
    ) -> Completion:
        """Return a completion with the labels of its steps, where the item has any."""
        if not isinstance(item, Mapping) or item.get("steps") is None:
            return completion
        joined, steps = steps_of(where, name, item["steps"], self.values, dropped, optional=True)
        check_reply(where, name, joined, completion.reply)
        return replace(completion, steps=steps)

    def _by_rank(self, where: str, path: Path, items: Sequence[object]) -> Preferences:
        """Return a preference for every two items with different ranks; rank 1 is the best."""
        key = self.roles.get("rank")
        if key is None:
            return ()
        ranks = [
            score_in(where, f"{path}[{n}].{key}", value_at(item, str(key)) if isinstance(item, Mapping) else None)
            for n, item in enumerate(items)
        ]
        return by_rank(ranks)


def _preferences(where: str, value: object) -> Preferences:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise wrong(where, "preferences", "a list of [better, worse]", value)
    for i, pair in enumerate(value):
        # By type: true and false are the indices 1 and 0 to Python.
        if not isinstance(pair, list) or [type(index) for index in pair] != [int, int]:
            raise wrong(where, f"preferences[{i}]", "two indices [better, worse]", pair)
    return tuple((better, worse) for better, worse in value)
