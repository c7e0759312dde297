"""Feedback records as rows of an Arrow table, with columns of numbers for questions about all records.

Texts stay in the table and are read for one record at a time. Which records share a prompt, and how their completions
were judged, is answered by columns of numbers. Texts are compared by digests of 64 bits: among ten million texts, two
different ones have the same digest with a probability of 1 in 400,000.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, pairwise, repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from halos.data.records.judgement import Judged, Judgement
from halos.data.records.record import (
    MESSAGE_ROLES,
    Completion,
    Conversation,
    Message,
    Prompt,
    Record,
    Step,
    messages_of,
    prompt_key,
    reply_key,
)
from halos.data.store.arrow import MEMORY, Part
from halos.data.store.table import Stored, Table

TEXTS = pa.list_(pa.large_string())
DIGESTS = pa.list_(pa.uint64())
COLUMNS: dict[str, pa.DataType] = {
    # Which record it is. "where" is its location, null if that is the id; "name" is the digest of the id.
    "id": pa.string(),
    "where": pa.string(),
    "name": pa.uint64(),
    # The record itself. "plain" is whether the prompt is a text, not turns.
    "plain": pa.bool_(),
    "roles": pa.list_(pa.int8()),
    "contents": TEXTS,
    "texts": TEXTS,
    # What few records have: a JSON object of :func:`_extra`, null for a record of plain texts.
    "extra": pa.large_string(),
    # A missing label is -1, a missing score or margin NaN: numpy reads columns without nulls without a copy.
    # Preferences are better, worse, better, worse, … in one flat list.
    "labels": pa.list_(pa.int8()),
    "scores": pa.list_(pa.float64()),
    "preferences": pa.list_(pa.int32()),
    # Of each step of a reply: the completion, the place where it ends in its text, and its label.
    "steps": pa.list_(pa.int32()),
    "weight": pa.float64(),
    "margin": pa.float64(),
    # Digests, which answer "same or different?" without texts. "judged" is that of labels, scores, preferences and
    # steps: views derive the examples of records with equal judgements once. "loose" ones are of normalised texts.
    "judged": pa.uint64(),
    "prompt": pa.uint64(),
    "loose_prompt": pa.uint64(),
    "completions": DIGESTS,
    "loose_completions": DIGESTS,
    # Two for each preference: of (prompt, better, worse) and of (prompt, worse, better); both 0 for equal texts.
    "pairs": DIGESTS,
    "prompt_characters": pa.int64(),
    "completion_characters": pa.list_(pa.int64()),
}
SCHEMA = pa.schema(COLUMNS)
NAN = float("nan")
SEPARATOR = "\x1d"
"""Between the texts of a digest: a control character that no real text has."""
# A record batch ends at whichever limit comes first: texts of any length then take bounded memory while it is built.
BATCH_RECORDS = 4096
BATCH_CHARACTERS = 1 << 22


def normalised(text: str) -> str:
    """Return a text in Unicode form NFKC, in lower case, and with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest(*parts: str) -> int:
    """Return a digest of texts, of 64 bits: equal for equal texts, never 0."""
    # Ids begin with file names, which may have lone surrogates where a name is not UTF-8.
    joined = SEPARATOR.join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little") or 1


_judged_digest = lru_cache(1 << 12)(digest)
"""The digest of judgements, of which most data sets have only a few."""


def loose_prompt(prompt: Prompt) -> int:
    """Return a digest that is equal for prompts that differ only in case, white space and forms of characters."""
    return digest(_loose_key(prompt))


def _loose_key(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return f"user\x1f{normalised(prompt)}"
    # Turn.text holds the other fields too: two calls of one tool with different arguments are different turns.
    turns = [f"{turn.role}\x1f{normalised(turn.text)}" for turn in messages_of(prompt)]
    if isinstance(prompt, Conversation):
        turns += [prompt.tools, prompt.template_kwargs]
    return SEPARATOR.join(turns)


class RecordTable(Stored[Record]):
    """Some or all records of a table, as a sequence.

    Args:
        table: the table, with the columns :data:`COLUMNS`.
        chosen: [records] their numbers in the table; None: all.
    """

    def __init__(self, table: Table, chosen: np.ndarray | None = None) -> None:
        self.table = table
        self.chosen = np.arange(len(table)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, indices: np.ndarray) -> RecordTable:
        """Return the records with these indices, in their order."""
        return RecordTable(self.table, self.chosen[indices])

    @property
    def key(self) -> str | None:
        """A key of the records and their order; None if the table is in memory."""
        if self.table.key is None:
            return None
        return hashlib.sha256(self.table.key.encode() + self.chosen.astype(np.int64).tobytes()).hexdigest()[:24]

    def numbers(self, name: str) -> np.ndarray:
        """Return a column of numbers, [records]."""
        return np.asarray(self.table.numbers(name)[self.chosen])

    def lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a column of lists of numbers as (the index of each number's record, the numbers)."""
        batches = [batch.column(name) for batch in self.table.batches]
        column = pa.chunked_array(batches, COLUMNS[name]).take(pa.array(self.chosen))
        return pc.list_parent_indices(column).to_numpy(), pc.list_flatten(column).to_numpy()

    def judgement(self, index: int) -> Judgement:
        """Return the labels, scores, preferences and labels of steps of a record."""
        names = ("labels", "scores", "preferences", "steps")
        labels, scores, preferences, steps = (
            self.table.list_at(int(self.chosen[index]), name).tolist() for name in names
        )
        of_steps = {place: tuple(step.desirable for step in labelled) for place, labelled in _steps(steps).items()}
        completions = tuple(
            Judged(place, _label(label), _score(score), of_steps.get(place, ()))
            for place, (label, score) in enumerate(zip(labels, scores, strict=True))
        )
        return Judgement(completions, _pairs(preferences))

    def ids(self, indices: Iterable[int]) -> list[str]:
        """Return the ids of the records with these indices."""
        return [str(self._text("id", int(index))) for index in indices]

    def where(self, index: int) -> str:
        """Return the location of a record, which may have an id of its own."""
        return self._text("where", index) or self.ids([index])[0]

    def many(self, indices: np.ndarray) -> list[Record]:
        # Each batch is read once and in order, whatever the order of the indices, and a repeated record is made once.
        rows, back = np.unique(self.chosen[indices], return_inverse=True)
        records = [record for batch in self.table.select(rows) for record in _records(batch)]
        return [records[place] for place in back]

    def _text(self, name: str, index: int) -> str | None:
        (batch,) = self.table.select(self.chosen[index : index + 1])
        text: str | None = batch.column(name)[0].as_py()
        return text


def batches(records: Iterable[tuple[str | None, Record]]) -> Iterator[pa.RecordBatch]:
    """Yield record batches of (location, record); the location is None if it is the record's id."""
    rows: list[dict[str, Any]] = []
    characters = 0
    for where, record in records:
        rows.append(_row(record, where))
        characters += rows[-1]["prompt_characters"] + sum(rows[-1]["completion_characters"])
        if len(rows) >= BATCH_RECORDS or characters >= BATCH_CHARACTERS:
            yield _batch(rows)
            rows, characters = [], 0
    yield _batch(rows)


def _batch(rows: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    # As RecordBatch.from_pylist does, which looks every value up by its name, twice.
    columns = zip(*(row.values() for row in rows), strict=True) if rows else repeat(())
    arrays = [pa.array(values, kind) for kind, values in zip(COLUMNS.values(), columns, strict=False)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _row(record: Record, where: str | None) -> dict[str, Any]:
    """Return the values of a record, in the order of :data:`COLUMNS`."""
    # One loop, and no call that most records do not need: this is done for each of perhaps millions of records.
    texts, replies, labels, scores = [], [], [], []
    for completion in record.completions:
        texts.append(completion.text)
        replies.append(reply_key(completion.turns) if completion.turns else completion.text)
        labels.append(-1 if completion.desirable is None else int(completion.desirable))
        scores.append(NAN if completion.score is None else completion.score)
    turns, key, loose_key = messages_of(record.prompt), prompt_key(record.prompt), _loose_key(record.prompt)
    preferences = list(chain.from_iterable(record.preferences))
    steps = _step_numbers(record)
    ways = [way for better, worse in record.preferences for way in _both_ways(key, replies[better], replies[worse])]
    return {
        "id": record.id,
        "where": None if where == record.id else where,
        "name": digest(record.id),
        "plain": isinstance(record.prompt, str),
        "roles": [MESSAGE_ROLES.index(turn.role) for turn in turns],
        "contents": [turn.content for turn in turns],
        "texts": texts,
        "extra": _extra(record, turns),
        "labels": labels,
        "scores": scores,
        "preferences": preferences,
        "steps": steps,
        "weight": record.weight,
        "margin": NAN if record.margin is None else record.margin,
        "judged": _judged_digest(repr((labels, scores, preferences, steps))),
        "prompt": digest(key),
        "loose_prompt": digest(loose_key),
        "completions": [digest(key, reply) for reply in replies],
        "loose_completions": [digest(loose_key, normalised(text)) for text in texts],
        "pairs": ways,
        "prompt_characters": sum([len(turn.text) for turn in turns]),
        "completion_characters": [len(text) for text in texts],
    }


def joined(tables: Sequence[RecordTable]) -> RecordTable:
    """Return the records of several tables, one table after the other; nothing is copied."""
    # RecordTable.key adds the choice of records; the key of the table has only to name the tables.
    keys = [records.table.key for records in tables]
    key = None if None in keys else hashlib.sha256(repr(keys).encode()).hexdigest()[:24]
    starts = np.cumsum([0, *(len(records.table) for records in tables)])
    chosen = np.concatenate([records.chosen + start for records, start in zip(tables, starts[:-1], strict=True)])
    return RecordTable(Table([batch for records in tables for batch in records.table.batches], key=key), chosen)


def table_of(records: Sequence[Record]) -> RecordTable:
    """Return the records as a table: a table as it is, a list as a table in memory."""
    return records if isinstance(records, RecordTable) else RecordTable(MEMORY.table(None, _part, [records]))


def _part(records: Sequence[Record]) -> Part:
    yield from batches((None, record) for record in records)
    return {}


def _both_ways(key: str, better: str, worse: str) -> tuple[int, int]:
    # Equal texts would otherwise contradict themselves, as both ways round are the same pair.
    return (0, 0) if better == worse else (digest(key, better, worse), digest(key, worse, better))


def _extra(record: Record, turns: Sequence[Message]) -> str | None:
    """Return what a record has beside texts, roles and judgements, as JSON; None for most records."""
    extra: dict[str, object] = {}
    if not isinstance(record.prompt, str) and any(turn.fields or not turn.weight for turn in turns):
        extra["turns"] = [(turn.fields, turn.weight) for turn in turns]
    if isinstance(record.prompt, Conversation):
        extra["context"] = (record.prompt.tools, record.prompt.template_kwargs)
    if any(completion.turns for completion in record.completions):
        extra["replies"] = [[_message_row(turn) for turn in completion.turns] for completion in record.completions]
    return json.dumps(extra) if extra else None


def _step_numbers(record: Record) -> list[int]:
    """Return the column ``steps`` of a record."""
    return [
        number
        for place, completion in enumerate(record.completions)
        for step in completion.steps
        for number in (place, step.stop, -1 if step.desirable is None else int(step.desirable))
    ]


def _steps(numbers: Sequence[int]) -> dict[int, tuple[Step, ...]]:
    """Return the steps of each completion that has any."""
    steps: dict[int, tuple[Step, ...]] = {}
    for place, stop, label in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
        steps[place] = (*steps.get(place, ()), Step(stop, _label(label)))
    return steps


def _message_row(turn: Message) -> tuple[str, str, str, int]:
    return turn.role, turn.content, turn.fields, turn.weight


def _records(batch: pa.RecordBatch) -> Iterator[Record]:
    scalars = (batch.column(name).to_pylist() for name in ("id", "plain", "extra", "weight", "margin"))
    names = ("roles", "contents", "texts", "labels", "scores", "preferences", "steps")
    columns = (_lists(batch.column(name)) for name in names)
    for name, is_text, extra, weight, margin, roles, contents, texts, labels, scores, preferences, steps in zip(
        *scalars, *columns, strict=True
    ):
        more = json.loads(extra) if extra else {}
        prompt = contents[0] if is_text else _prompt(roles, contents, more)
        completions = _completions(texts, labels, scores, more.get("replies"))
        if steps:
            steps_by_place = _steps(steps)
            completions = tuple(replace(one, steps=steps_by_place.get(n, ())) for n, one in enumerate(completions))
        yield Record(name, prompt, completions, _pairs(preferences), weight, _score(margin))


def _prompt(roles: Sequence[int], contents: Sequence[str], more: dict[str, Any]) -> Prompt:
    others = more.get("turns") or [()] * len(roles)
    parts = zip(roles, contents, others, strict=True)
    turns = tuple(Message(MESSAGE_ROLES[role], content, *other) for role, content, other in parts)
    return Conversation(turns, *more["context"]) if "context" in more else turns


def _completions(
    texts: Sequence[str], labels: Sequence[int], scores: Sequence[float], replies: list[list[Any]] | None
) -> tuple[Completion, ...]:
    judged = zip(texts, map(_label, labels), map(_score, scores), strict=True)
    if replies is None:
        return tuple([Completion(text, label, score) for text, label, score in judged])
    turns = (tuple(Message(*turn) for turn in reply) for reply in replies)
    return tuple(Completion(*values, reply_turns) for values, reply_turns in zip(judged, turns, strict=True))


def _label(number: int) -> bool | None:
    return None if number < 0 else bool(number)


def _score(number: float) -> float | None:
    # Only NaN differs from itself; math.isnan would be a call for each of millions of scores.
    return None if number != number else number


def _pairs(places: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(places[::2], places[1::2], strict=True))


def _lists(column: pa.ListArray) -> list[list[Any]]:
    """Return the lists of a column, far faster than ``to_pylist``, which makes an Arrow object for every list."""
    values = column.flatten().to_pylist()
    ends = column.offsets.to_numpy()
    # A slice of a batch keeps the offsets of the whole batch, but flatten returns the values of the slice alone.
    return [values[a:z] for a, z in pairwise((ends - ends[0]).tolist())]
