"""Examples of a view → rows of token ids: one prompt followed by one or more completions (branches).

What each branch is depends on the view: pairs have (chosen, rejected); the other views have one completion, and a
second, mismatched one where the objective asks for KTO's reference point.

Token ids lie in an Arrow table, whole: what the limits, a control token or a mismatched completion make of them is
made when a row is asked for.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from halos.data.records.record import prompt_key
from halos.data.records.table import digest
from halos.data.rows.chat_tokens import ChatTokens
from halos.data.rows.mismatch import derangement, in_order
from halos.data.rows.templates import check_prefixes
from halos.data.store.arrow import MEMORY, Part, Store, Stored, Table
from halos.data.views.examples import Demonstration, Examples, Labelled, Pair, Scored

Example = Demonstration | Labelled | Pair | Scored
Control = Callable[[bool | None], str]
"""From an example's label to the text that ends its prompt (CSFT's control tokens)."""

BRANCHES = ("first", "second")
TOKENS = pa.list_(pa.int32())
COLUMNS: dict[str, Any] = {
    "id": pa.string(),
    "prompt": TOKENS,
    "first": TOKENS,
    "second": TOKENS,  # of pairs
    "prompt_digest": pa.uint64(),
    "label": pa.int8(),  # -1: none
    "score": pa.float64(),  # NaN: none
}
TASK = 1 << 13
"""Examples that one process tokenises before it writes them down, …"""
TOGETHER = 512
"""… so many at a time."""


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of one example: the prompt's, and those of each branch."""

    id: str
    group: int
    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    desirable: bool | None = None
    score: float | None = None


def group_sizes(rows: Sequence[Row]) -> np.ndarray:
    """How many of the rows each group has, by its number."""
    return np.bincount(rows.groups if isinstance(rows, TokenRows) else [row.group for row in rows])


class TokenRows(Stored[Row]):
    """Rows of a table of token ids, within the limits.

    ``groups`` [n]: equal numbers for equal prompts, in the order of their first examples. ``labels`` [n]: 1 desirable,
    0 not, -1 unknown. ``partners`` [n]: whose completion is the mismatched one, where there is one.
    """

    def __init__(self, table: Table, tokens: ChatTokens, control: Control, mismatched_seed: int | None) -> None:
        self.table, self.limits, self._bos = table, tokens.limits, tokens.tokenizer.bos_token_id
        self.labels, self._scores = table.numbers("label"), table.numbers("score")
        self.groups = in_order(table.numbers("prompt_digest"))
        self.control = {label: tokens.control(control(said)) for label, said in ((1, True), (0, False), (-1, None))}
        added = np.array([len(self.control[label]) for label in (0, 1, -1)])  # -1 is the last
        self._prompts = table.sizes("prompt") + added[self.labels]
        limit = self.limits.max_prompt_length
        self.prompt_sizes = self._prompts if limit is None else np.minimum(self._prompts, limit)
        self._whole = [table.sizes(name) for name in BRANCHES]
        if not self._whole[1].any():
            del self._whole[1]
        wrong = (self._prompts == 0) | (False if limit is not None else self._prompts >= self.limits.max_length)
        if wrong.any():
            self[int(np.argmax(wrong))]  # raises
        self.partners: np.ndarray | None = None
        if mismatched_seed is not None:
            self.partners = np.frombuffer(derangement(self.groups, mismatched_seed), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.table)

    def many(self, indices: np.ndarray) -> list[Row]:
        return [self._row(int(index)) for index in indices]

    def sizes(self, *, mismatched: bool = True) -> list[np.ndarray]:
        """The tokens of each branch, [n] each; the mismatched one comes last."""
        room = self.limits.max_length - self.prompt_sizes
        whole = list(self._whole)
        if mismatched and self.partners is not None:
            whole.append(whole[0][self.partners])
        return [np.minimum(size, room) for size in whole]

    def tokens(self) -> np.ndarray:
        """The tokens of each row's branches with their prompt before each, [n]."""
        return np.sum([self.prompt_sizes + size for size in self.sizes()], axis=0)

    def longest(self) -> int:
        """The tokens of the longest branch with its prompt."""
        return int((self.prompt_sizes + np.max(self.sizes(), axis=0)).max())

    def cut(self) -> dict[str, np.ndarray]:
        """How often something was cut in each row, [n], by what it was."""
        room = self.limits.max_length - self.prompt_sizes
        return {
            "prompts truncated": (self._prompts > self.prompt_sizes).astype(int),
            "completions truncated": np.sum([whole > room for whole in self._whole], axis=0),
        }

    def digest(self) -> str:
        """A key of all token ids, labels and scores, and of their order."""
        told = [notes["digest"] for notes in self.table.notes]
        kept = hashlib.sha256(repr((told, sorted(self.control.items()), self.limits)).encode())
        kept.update(b"" if self.partners is None else self.partners.tobytes())
        return kept.hexdigest()[:12]

    def ids(self, indices: np.ndarray) -> list[str]:
        """The ids of these rows, which ascend."""
        return [name for batch in self.table.select(indices) for name in batch.column("id").to_pylist()]

    def _row(self, index: int) -> Row:
        (name,) = self.ids(np.array([index]))
        label, score = int(self.labels[index]), float(self._scores[index])
        ids = self.table.list_at(index, "prompt").tolist() + self.control[label]
        prompt, _ = self.limits.fit_prompt(ids, self._bos, name)
        places = [(index, column) for column in BRANCHES[: len(self._whole)]]
        if self.partners is not None:
            places.append((int(self.partners[index]), "first"))
        whole = (self.table.list_at(row, column).tolist() for row, column in places)
        return Row(
            id=name,
            group=int(self.groups[index]),
            prompt=tuple(prompt),
            branches=tuple(tuple(self.limits.fit_completion(ids, len(prompt))[0]) for ids in whole),
            desirable=None if label < 0 else bool(label),
            score=None if np.isnan(score) else score,
        )


@dataclass(slots=True)
class Rows:
    """All rows of one data set, and counts of what was cut or dropped on the way."""

    rows: Sequence[Row]
    report: Counter[str] = field(default_factory=Counter)
    truncated: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(what was cut, the file that it came from) → how often."""
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    """In tokens."""

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """A key of what a run reads: token ids, labels and scores, in their order."""
        rows: Any = self.rows
        return str(rows.digest())


def make_rows(
    examples: Sequence[Example],
    tokens: ChatTokens,
    *,
    control: Control = lambda _: "",
    mismatched_seed: int | None = None,
    origin: Callable[[str], str] = str,
    store: Store = MEMORY,
) -> Rows:
    """Tokenise examples; with ``mismatched_seed`` each row gets another prompt's completion as its last branch.

    ``origin`` says which file an example comes from, by its id. Raises ``ValueError`` naming the example for a prompt
    over the limits or one that the chat template does not write the same way behind a completion, and if nothing is
    left.
    """
    if not examples:
        raise ValueError("expected at least one example, found none")
    key = examples.key if isinstance(examples, Examples) else None
    spans = [range(start, min(start + TASK, len(examples))) for start in range(0, len(examples), TASK)]
    table = store.table(key and f"{key}-{tokens.key}", partial(_tokenised, examples, tokens), spans)
    rows = TokenRows(table, tokens, control, mismatched_seed)
    report: Counter[str] = Counter()
    truncated: Counter[tuple[str, str]] = Counter()
    for reason, counts in rows.cut().items():
        report[reason] += int(counts.sum())
        places = np.flatnonzero(counts)
        for name, count in zip(rows.ids(places), counts[places].tolist(), strict=True):
            truncated[reason, origin(name)] += count
    lengths = {
        "prompt (tokens)": rows.prompt_sizes,
        "completion (tokens)": np.concatenate(rows.sizes(mismatched=False)),
    }
    return Rows(rows, +report, truncated, lengths)


def few_rows(
    examples: Sequence[Example], partners: Sequence[Example], tokens: ChatTokens, control: Control
) -> tuple[list[Row], Counter[str]]:
    """The rows that :func:`make_rows` makes of these examples, and counts of what was cut; ``partners``: for each
    the one whose completion is the mismatched one, or none at all."""
    own = {id(example) for example in examples}  # not their names: a stream may have one in several places
    everything = [*examples, *(partner for partner in partners if id(partner) not in own)]
    check_prefixes(tokens.tokenizer, ((e.id, e.prompt, texts_of(e)[0]) for e in everything))
    rows = TokenRows(Table([token_batch(everything, tokens)]), tokens, control, None)
    if partners:
        places = {id(example): place for place, example in enumerate(everything)}
        rows.partners = np.array([places[id(partner)] for partner in partners])
    cut = {reason: int(counts[: len(examples)].sum()) for reason, counts in rows.cut().items()}
    return rows.many(np.arange(len(examples))), Counter(cut)


def _tokenised(examples: Sequence[Example], tokens: ChatTokens, span: range) -> Part:
    found = hashlib.sha256()
    for start in range(span.start, span.stop, TOGETHER):
        part = examples[start : min(start + TOGETHER, span.stop)]
        check_prefixes(tokens.tokenizer, ((e.id, e.prompt, texts_of(e)[0]) for e in part))
        batch = token_batch(part, tokens)
        for name in ("prompt", *BRANCHES, "label", "score"):
            column = batch.column(name)
            for array_ in (column.offsets, column.values) if name in ("prompt", *BRANCHES) else (column,):
                found.update(array_.to_numpy().tobytes())
        yield batch
    return {"digest": found.hexdigest()}


def token_batch(examples: Sequence[Example], tokens: ChatTokens) -> pa.RecordBatch:
    """The token ids of examples, whole, as a batch of :data:`COLUMNS`."""
    texts = [texts_of(example) for example in examples]
    branches = iter(tokens.many_completions([text for both in texts for text in both]))
    both = [(next(branches), next(branches) if len(given) == 2 else []) for given in texts]
    labels = [_label(example) for example in examples]
    values: dict[str, list[Any]] = {
        "id": [example.id for example in examples],
        "prompt": tokens.many_prompts([e.prompt for e in examples], [e.id for e in examples]),
        "first": [first for first, _ in both],
        "second": [second for _, second in both],
        "prompt_digest": [digest(prompt_key(example.prompt)) for example in examples],
        "label": [-1 if label is None else int(label) for label in labels],
        "score": [e.score if isinstance(e, Scored) else float("nan") for e in examples],
    }
    arrays = [pa.array(values[name], kind) for name, kind in COLUMNS.items()]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(list(COLUMNS.items())))


def _label(example: Example) -> bool | None:
    # The sign of a score is the label by which rewards are sorted in metrics.
    if isinstance(example, Scored):
        return example.score > 0
    return example.desirable if isinstance(example, Labelled) else None


def texts_of(example: Example) -> tuple[str, ...]:
    """The example's completions, the chosen one of a pair first."""
    return (example.chosen, example.rejected) if isinstance(example, Pair) else (example.completion,)
