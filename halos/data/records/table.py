"""Feedback records as rows of an Arrow table, with the numbers that are asked of all of them at once.

Texts stay in the table; what is asked of all records (which have one prompt, what was said of their completions) are
columns of numbers. Texts are compared by digests of 64 bits: of ten million, one pair would be taken for equal in a
run in 400,000.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from halos.data.records.judgement import Judged, Judgement
from halos.data.records.record import ROLES, Completion, Message, Prompt, Record, messages_of, prompt_key
from halos.data.store.arrow import MEMORY, Part, Stored, Table

TEXTS = pa.list_(pa.large_string())
DIGESTS = pa.list_(pa.uint64())
COLUMNS: dict[str, Any] = {
    "id": pa.string(),
    "where": pa.string(),  # null where it is the id
    "name": pa.uint64(),  # the id's digest
    "plain": pa.bool_(),  # the prompt is a text, not turns
    "roles": pa.list_(pa.int8()),
    "contents": TEXTS,
    "texts": TEXTS,
    "labels": pa.list_(pa.int8()),  # -1: none
    "scores": pa.list_(pa.float64()),  # NaN: none
    "preferences": pa.list_(pa.int32()),  # better, worse, better, worse, …
    "judged": pa.uint64(),  # digest of labels, scores and preferences
    "prompt": pa.uint64(),
    "loose_prompt": pa.uint64(),  # the loose ones are of normalised texts
    "completions": DIGESTS,  # of prompt and text
    "loose_completions": DIGESTS,
    "pairs": DIGESTS,  # of prompt, better and worse text, and of these the other way round; 0, 0 where they are equal
    "prompt_characters": pa.int64(),
    "completion_characters": pa.list_(pa.int64()),
}
SCHEMA = pa.schema(list(COLUMNS.items()))
BATCH_RECORDS = 4096
BATCH_CHARACTERS = 1 << 22


def normalised(text: str) -> str:
    """``text`` in NFKC, lower case and with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest(*parts: str) -> int:
    """A key of texts: equal for equal texts, never 0."""
    joined = "\x1d".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little") or 1


def loose_prompt(prompt: Prompt) -> int:
    """A key that is the same for prompts that differ in case, white space and forms of characters alone."""
    return digest(*_loosely(messages_of(prompt)))


def _loosely(turns: Sequence[Message]) -> list[str]:
    return [f"{turn.role}\x1f{normalised(turn.content)}" for turn in turns]


class RecordTable(Stored[Record]):
    """Records of a table, or some of them (``chosen``, their numbers in the table)."""

    def __init__(self, table: Table, chosen: np.ndarray | None = None) -> None:
        self.table = table
        self.chosen = np.arange(len(table)) if chosen is None else chosen
        self._ends: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, indices: np.ndarray) -> RecordTable:
        """Those of these records."""
        return RecordTable(self.table, self.chosen[indices])

    @property
    def key(self) -> str | None:
        """A key of the records and their order; None where the table is in memory."""
        if self.table.key is None:
            return None
        return hashlib.sha256(self.table.key.encode() + self.chosen.astype(np.int64).tobytes()).hexdigest()[:24]

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, one for each record."""
        return self.table.numbers(name)[self.chosen]

    def lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(the record that each stands in, all of them) of a column of lists of numbers."""
        ends, values = self._column(name)
        starts = ends[self.chosen]
        sizes = ends[self.chosen + 1] - starts
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.repeat(np.arange(len(self)), sizes), values[np.repeat(starts, sizes) + within]

    def judgement(self, index: int) -> Judgement:
        """What is said of the completions of a record."""
        row = int(self.chosen[index])
        labels, scores, better = (self._of(name, row) for name in ("labels", "scores", "preferences"))
        return Judgement(
            tuple(
                Judged(place, None if label < 0 else bool(label), None if score != score else score)
                for place, (label, score) in enumerate(zip(labels, scores, strict=True))
            ),
            tuple(zip(better[::2], better[1::2], strict=True)),
        )

    def ids(self, indices: Iterable[int]) -> list[str]:
        """The ids of these records."""
        return [self._cell("id", int(index)) for index in indices]

    def where(self, index: int) -> str:
        """Where a record stands, whatever its id."""
        return self._cell("where", index) or self._cell("id", index)

    def many(self, indices: np.ndarray) -> list[Record]:
        rows, back = np.unique(self.chosen[indices], return_inverse=True)
        made = [record for batch in self.table.select(rows) for record in _records(batch)]
        return [made[place] for place in back]

    def _cell(self, name: str, index: int) -> Any:
        (batch,) = self.table.select(self.chosen[index : index + 1])
        return batch.column(name)[0].as_py()

    def _of(self, name: str, row: int) -> list[Any]:
        ends, values = self._column(name)
        return values[ends[row] : ends[row + 1]].tolist()

    def _column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name not in self._ends:
            ends = np.concatenate([[0], np.cumsum(self.table.sizes(name))])
            self._ends[name] = (ends, self.table.values(name))
        return self._ends[name]


class Builder:
    """Records on their way into record batches."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._characters = 0

    @property
    def full(self) -> bool:
        return len(self._columns["id"]) >= BATCH_RECORDS or self._characters >= BATCH_CHARACTERS

    def add(self, record: Record, where: str | None = None) -> None:
        """Add a record that stands at ``where``, unless that is its id."""
        texts = [completion.text for completion in record.completions]
        turns = messages_of(record.prompt)
        labels = [-1 if c.desirable is None else int(c.desirable) for c in record.completions]
        scores = [float("nan") if c.score is None else c.score for c in record.completions]
        preferences = [place for pair in record.preferences for place in pair]
        key, loosely = prompt_key(record.prompt), _loosely(turns)
        values = (
            record.id,
            None if where == record.id else where,
            digest(record.id),
            isinstance(record.prompt, str),
            [ROLES.index(turn.role) for turn in turns],
            [turn.content for turn in turns],
            texts,
            labels,
            scores,
            preferences,
            digest(repr((labels, scores, preferences))),
            digest(key),
            digest(*loosely),
            [digest(key, text) for text in texts],
            [digest(*loosely, normalised(text)) for text in texts],
            [found for better, worse in record.preferences for found in _both_ways(key, texts[better], texts[worse])],
            sum(len(turn.content) for turn in turns),
            [len(text) for text in texts],
        )
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
        self._characters += values[-2] + sum(values[-1])

    def batch(self) -> pa.RecordBatch:
        """What was added since the last batch."""
        arrays = [pa.array(self._columns[name], kind) for name, kind in COLUMNS.items()]
        self.__init__()  # type: ignore[misc]
        return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def batches(records: Iterable[tuple[str | None, Record]]) -> Iterator[pa.RecordBatch]:
    """Record batches of (where it stands, record)."""
    builder = Builder()
    for where, record in records:
        builder.add(record, where)
        if builder.full:
            yield builder.batch()
    yield builder.batch()


def joined(parts: Sequence[RecordTable]) -> RecordTable:
    """The records of several tables, one table after the other."""
    keys = [part.table.key for part in parts]
    key = None if None in keys else hashlib.sha256(repr(keys).encode()).hexdigest()[:24]
    starts = np.cumsum([0, *(len(part.table) for part in parts)])
    chosen = np.concatenate([part.chosen + start for part, start in zip(parts, starts[:-1], strict=True)])
    return RecordTable(Table([batch for part in parts for batch in part.table.batches], key=key), chosen)


def table_of(records: Sequence[Record]) -> RecordTable:
    """The records as a table: as they are, or in memory where they are a list."""
    return records if isinstance(records, RecordTable) else RecordTable(MEMORY.table(None, _listed, [records]))


def _listed(records: Sequence[Record]) -> Part:
    yield from batches((None, record) for record in records)
    return {}


def _both_ways(key: str, better: str, worse: str) -> tuple[int, int]:
    return (0, 0) if better == worse else (digest(key, better, worse), digest(key, worse, better))


def _records(batch: pa.RecordBatch) -> Iterator[Record]:
    ids, plain = batch.column("id").to_pylist(), batch.column("plain").to_pylist()
    columns = (
        _nested(batch.column(name)) for name in ("roles", "contents", "texts", "labels", "scores", "preferences")
    )
    for name, is_text, roles, contents, texts, labels, scores, preferences in zip(ids, plain, *columns, strict=True):
        yield Record(
            name,
            contents[0] if is_text else _turns(roles, contents),
            tuple(
                Completion(text, None if label < 0 else bool(label), None if score != score else score)
                for text, label, score in zip(texts, labels, scores, strict=True)
            ),
            tuple(zip(preferences[::2], preferences[1::2], strict=True)),
        )


def _turns(roles: Sequence[int], contents: Sequence[str]) -> Prompt:
    return tuple(Message(ROLES[role], content) for role, content in zip(roles, contents, strict=True))


def _nested(column: Any) -> list[list[Any]]:
    """The lists of a column: far faster than ``to_pylist``, which makes an object of Arrow's for every list."""
    values = column.flatten().to_pylist()
    ends = column.offsets.to_numpy()
    return [values[a:z] for a, z in pairwise((ends - ends[0]).tolist())]
