"""Rows of token ids from the examples of a view: one prompt followed by one or more completions (branches).

The view decides what the branches are: a pair has (chosen, rejected); the other views have one completion, and a
second, mismatched one if the objective needs KTO's reference point.

Token ids are stored untruncated in an Arrow table. Limits, control tokens and mismatched completions are applied when
a row is read, so that runs with different settings share one table on disk. (Two cases have tables of their own:
completions after control tokens, and mismatched completions whose ids depend on their new prompts.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from halos.data.rows.chat_tokens import ChatTokens
from halos.data.rows.mismatch import in_order
from halos.data.store.table import Stored, Table

Control = Callable[[bool | None], str]
"""Maps an example's label to the text that ends its prompt (CSFT's control tokens)."""
Controls = Mapping[bool | None, str]

BRANCHES = ("first", "second")
GRADED = ("margin", "score_chosen", "score_rejected")
TOKENS = pa.list_(pa.int32())
Span = tuple[int, int]
"""A range of consecutive tokens: the place of the first token, and the place after the last one."""
COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "prompt": TOKENS,
    "first": TOKENS,
    "second": TOKENS,  # of pairs
    "context": TOKENS,  # spans of completion tokens that are not scored: branch, start, stop, branch, start, …
    "prompt_digest": pa.uint64(),
    "conversation_digest": pa.uint64(),
    "step": pa.int32(),  # of a step of a completion, which "first" ends with: its first token; -1: none
    "label": pa.int8(),  # -1: none
    "score": pa.float64(),  # NaN: none
    "weight": pa.float32(),
    "graded": pa.list_(pa.float64()),  # of pairs: margin, chosen score, rejected score (NaN: none); empty without any
}


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of one example.

    Attributes:
        id: the id of the example.
        group: a number that rows of the same prompt share.
        prompt: token ids of the prompt.
        branches: token ids of each completion, end-of-turn token included unless it was cut off.
        context: for each completion the spans of its tokens that are not scored, such as a user turn between two
            assistant turns, or the steps before a labelled step; empty if all tokens of all completions are scored.
        desirable: the label, or None.
        score: the reward, or None.
        weight: how much the example counts.
        margin: for a pair, by how much the first completion is preferred, or None.
        score_chosen, score_rejected: for a pair, the scores of its completions, or None.
        views: for a record that is read in several views, its examples in each (:mod:`halos.data.rows.joint_rows`).
        mismatched: for such a record, how many of its last completions are other prompts' completions (KTO's y').
    """

    id: str
    group: int
    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    desirable: bool | None = None
    score: float | None = None
    weight: float = 1.0
    margin: float | None = None
    score_chosen: float | None = None
    score_rejected: float | None = None
    context: tuple[tuple[Span, ...], ...] = ()
    views: tuple[ViewRows, ...] = ()
    mismatched: int = 0

    def scored(self, branch: int) -> Sequence[int]:
        """The places of a completion's scored tokens, ascending."""
        places = range(len(self.branches[branch]))
        spans = self.context[branch] if self.context else ()
        return [n for n in places if not any(start <= n < stop for start, stop in spans)] if spans else places


@dataclass(frozen=True, slots=True)
class ViewRows:
    """The examples of one record in one view.

    Attributes:
        view: the name of the view.
        rows: a row for each example; empty if the record has no example of the view.
        mismatched: whether the last branch of each row is another prompt's completion.
    """

    view: str
    rows: tuple[Row, ...] = ()
    mismatched: bool = False

    @property
    def branches(self) -> int:
        """The number of branches of each row."""
        return 1 + (self.view == "pairs") + self.mismatched


def group_sizes(rows: Sequence[Row]) -> np.ndarray:
    """[groups] the number of rows in each group."""
    return np.bincount(rows.groups if isinstance(rows, TokenRows) else np.array([row.group for row in rows], dtype=int))


def graded(row: Row) -> list[float]:
    """Return margin, chosen score and rejected score of a pair; NaN where there is none."""
    return [math.nan if (value := getattr(row, name)) is None else value for name in GRADED]


class TokenRows(Stored[Row]):
    """The rows of a table of token ids, truncated to the limits when they are read.

    Args:
        table: a table with the columns :data:`COLUMNS`.
        tokens: the limits, and the tokenizer of control texts.
        control: see :data:`Control`.
        partners: [n] for each row, the row whose completion is its mismatched completion; None: rows have none.
        mismatched: a table of the mismatched completions as tokenised after their new prompts; None: their ids do not
            depend on the prompt and are read from the partners' rows.

    Attributes:
        labels: [n] 1 desirable, 0 undesirable, -1 unknown.
        groups: [n] equal numbers for equal prompts, in the order of their first examples.
        conversations: [n] likewise for prompts whose conversations begin with the same user turn.
        partners: see above.
        prompt_sizes: [n] tokens in each prompt, after truncation.

    Raises:
        ValueError: a prompt does not fit into the limits; the error names its row.
    """

    def __init__(
        self,
        table: Table,
        tokens: ChatTokens,
        control: Control,
        partners: np.ndarray | None = None,
        mismatched: Table | None = None,
    ) -> None:
        self.partners, self._mismatched = partners, mismatched
        self.table, self.limits, self._bos = table, tokens.limits, tokens.tokenizer.bos_token_id
        self.labels, self._scores, self._weights = map(table.numbers, ("label", "score", "weight"))
        self._steps = table.numbers("step")
        self.groups = in_order(table.numbers("prompt_digest"))
        self.conversations = in_order(table.numbers("conversation_digest"))
        self.control = {code: tokens.control(control(label)) for code, label in ((1, True), (0, False), (-1, None))}
        # Indexed by the label's code: 0, 1, or -1 for the last element.
        control_sizes = np.array([len(self.control[code]) for code in (0, 1, -1)])
        self._full_prompt_sizes = table.sizes("prompt") + control_sizes[self.labels]
        limit = self.limits.max_prompt_length
        self.prompt_sizes = self._full_prompt_sizes if limit is None else np.minimum(self._full_prompt_sizes, limit)
        self._full_sizes = [table.sizes(name) for name in BRANCHES]
        if not self._full_sizes[1].any():
            del self._full_sizes[1]  # no pairs
        too_long = self._full_prompt_sizes >= self.limits.max_length
        bad = (self._full_prompt_sizes == 0) | (too_long & (limit is None))
        if bad.any():
            self[int(np.argmax(bad))]  # reading the first bad row raises the error about it

    def __len__(self) -> int:
        return len(self.table)

    @property
    def views(self) -> list[TokenRows]:
        """These rows, which are of one view."""
        return [self]

    def many(self, indices: np.ndarray) -> list[Row]:
        return [self._row(int(index)) for index in indices]

    def sizes(self, *, mismatched: bool = True) -> list[np.ndarray]:
        """[n] tokens of each branch, after truncation; the mismatched branch comes last."""
        # Computed from the columns' offsets, so that statistics of a large table need not read its tokens.
        room = self.limits.max_length - self.prompt_sizes
        sizes = list(self._full_sizes)
        if mismatched and self.partners is not None:
            mismatched_rows = self._mismatched
            sizes.append(sizes[0][self.partners] if mismatched_rows is None else mismatched_rows.sizes("first"))
        return [np.minimum(size, room) for size in sizes]

    def tokens(self) -> np.ndarray:
        """[n] tokens of each row; the prompt counts once for each branch."""
        total: np.ndarray = np.sum([self.prompt_sizes + size for size in self.sizes()], axis=0)
        return total

    def longest(self) -> int:
        """Tokens of the longest prompt with one branch."""
        return int((self.prompt_sizes + np.max(self.sizes(), axis=0)).max())

    def cut(self) -> dict[str, np.ndarray]:
        """[n] how many prompts and completions of each row were truncated."""
        room = self.limits.max_length - self.prompt_sizes
        return {
            "prompts truncated": (self._full_prompt_sizes > self.prompt_sizes).astype(int),
            "completions truncated": np.sum([size > room for size in self._full_sizes], axis=0),
        }

    def unlearnable_steps(self) -> dict[str, np.ndarray]:
        """[n] for each reason, whether a row is a step that cannot be learned from."""
        room, stops = self.limits.max_length - self.prompt_sizes, self._full_sizes[0]
        return {
            "steps cut by data.max_length left out": (self._steps >= 0) & (stops > room),
            "steps without a token of their own left out": (self._steps >= stops) & (stops <= room),
        }

    def equal_pairs(self) -> np.ndarray:
        """Indices of the pairs whose two completions have the same token ids after truncation, ascending."""
        if len(self._full_sizes) < 2:
            return np.zeros(0, dtype=np.int64)
        first, second = self.sizes(mismatched=False)
        # Few pairs have two completions of the same size, so few tokens are read.
        indices = np.flatnonzero(first == second)
        pairs = zip(indices.tolist(), first[indices].tolist(), strict=True)
        return np.array([index for index, size in pairs if self._has_equal_sides(index, size)], dtype=np.int64)

    def _has_equal_sides(self, index: int, size: int) -> bool:
        chosen, rejected = (self.table.list_at(index, name)[:size] for name in BRANCHES)
        return bool(np.array_equal(chosen, rejected))

    def graded(self) -> np.ndarray:
        """[n, 3] margin, chosen score and rejected score of each pair; NaN where there is none."""
        values = np.full((len(self), len(GRADED)), np.nan)
        for index in np.flatnonzero(self.table.sizes("graded")).tolist():
            values[index] = self.table.list_at(index, "graded")
        return values

    def digest(self) -> str:
        """A key of all token ids, labels and scores, in their order."""
        tables = (self.table,) if self._mismatched is None else (self.table, self._mismatched)
        contents = [notes["digest"] for table in tables for notes in table.notes]
        key = hashlib.sha256(repr((contents, sorted(self.control.items()), self.limits)).encode())
        key.update(b"" if self.partners is None else self.partners.tobytes())
        return key.hexdigest()[:12]

    def ids(self, indices: np.ndarray) -> list[str]:
        """The ids of these rows. The indices must be ascending."""
        return [name for batch in self.table.select(indices) for name in batch.column("id").to_pylist()]

    def _row(self, index: int) -> Row:
        # The columns that the order of examples depends on are in memory; ids and tokens are read from the mapped file.
        name = self.table.text_at(index, "id")
        label, score = int(self.labels[index]), float(self._scores[index])
        margin, score_chosen, score_rejected = self._graded(index)
        # The control token is added before truncation, so that it stays at the end of a truncated prompt.
        prompt_ids = self.table.list_at(index, "prompt").tolist() + self.control[label]
        prompt, _ = self.limits.fit_prompt(prompt_ids, self._bos, name)
        sources = [(self.table, index, column) for column in BRANCHES[: len(self._full_sizes)]]
        if self._mismatched is not None:
            sources.append((self._mismatched, index, "first"))
        elif self.partners is not None:
            sources.append((self.table, int(self.partners[index]), "first"))
        completions = [table.list_at(place, column) for table, place, column in sources]
        branches = tuple(tuple(self.limits.fit_completion(ids.tolist(), len(prompt))[0]) for ids in completions)
        context = tuple(
            _spans(table.list_at(place, "context"), column)
            or _before(table.numbers("step")[place], len(ids), len(branch))
            for (table, place, column), ids, branch in zip(sources, completions, branches, strict=True)
        )
        return Row(
            id=name,
            group=int(self.groups[index]),
            prompt=tuple(prompt),
            branches=branches,
            desirable=None if label < 0 else bool(label),
            score=None if np.isnan(score) else score,
            weight=float(self._weights[index]),
            context=context if any(context) else (),
            margin=margin,
            score_chosen=score_chosen,
            score_rejected=score_rejected,
        )

    def _graded(self, index: int) -> list[float | None]:
        values = self.table.list_at(index, "graded").tolist() or [np.nan] * len(GRADED)
        return [None if np.isnan(value) else value for value in values]


def _spans(context: np.ndarray, column: str) -> tuple[Span, ...]:
    """The spans of one completion in the column ``context``."""
    return tuple((start, stop) for branch, start, stop in context.reshape(-1, 3).tolist() if BRANCHES[branch] == column)


def _before(step: int, size: int, room: int) -> tuple[Span, ...]:
    """The span of the tokens before a step, which are not scored; empty for a whole completion.

    Args:
        step: the place of the step's first token, or −1 for a whole completion.
        size: the number of tokens of the completion up to the end of the step.
        room: how many of them fit. A step always fits into its own row, but perhaps not after another prompt (as KTO's
            y'). Then the last tokens that fit are scored, as many as the step has.
    """
    start = min(int(step), room - min(room, size - int(step)))
    return ((0, start),) if step > 0 and start else ()
