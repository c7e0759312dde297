"""Turns examples into token rows: a table of token ids, mismatched completions, and counts of what was cut."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from halos.data.records.record import Reply, conversation_key, prompt_key
from halos.data.records.table import digest
from halos.data.rows.chat_tokens import ChatTokens
from halos.data.rows.exchanges import Exchange, Shape, Tokenised
from halos.data.rows.joint_rows import JointRows
from halos.data.rows.mismatch import derangement, in_order
from halos.data.rows.refusals import Refusals
from halos.data.rows.token_rows import BRANCHES, COLUMNS, GRADED, Control, Controls, Row, TokenRows
from halos.data.rows.unknown import check_known, count_unknown, unknown_id
from halos.data.rows.written import check_written
from halos.data.store.arrow import MEMORY, Part, Store
from halos.data.store.table import Stored, Table
from halos.data.views.examples import Example, Examples, Labelled, Pair, Scored

TOKENISE_EXAMPLES_PER_TASK = 1 << 13
"""Examples that a process tokenises before it takes the next task."""
TOKENISE_EXAMPLES_PER_BATCH = 512
"""Examples in one call of the tokenizer and in one batch of the table. Their texts are in memory at the same time."""
MAX_SHAPES = 8
"""The maximum number of shapes in the notes of a part."""


@dataclass(slots=True)
class SplitRows:
    """All rows of a split, and counts of what was truncated.

    Attributes:
        table: the rows.
        report: how many prompts and completions were truncated.
        truncated: these numbers for each file, by (what was truncated, file).
        lengths: lengths in tokens, [n], by what was measured.
    """

    table: TokenRows | JointRows
    report: Counter[str] = field(default_factory=Counter)
    truncated: Counter[tuple[str, str]] = field(default_factory=Counter)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)


def make_rows(
    examples: Sequence[Example],
    tokens: ChatTokens,
    *,
    control: Control = lambda _: "",
    mismatched_seed: int | None = None,
    origin: Callable[[str], str] = str,
    store: Store = MEMORY,
) -> SplitRows:
    """Tokenise examples.

    Args:
        examples: the examples of one split.
        tokens: the tokenizer and the limits.
        control: see :data:`Control`.
        mismatched_seed: the seed with which each row gets another prompt's completion as its last branch; None: rows
            have no mismatched completions.
        origin: maps an example's id to the file that it comes from.
        store: keeps the table of token ids for later runs.

    Raises:
        ValueError: there are no examples, a prompt is over the limits, the chat template writes a prompt differently
            when a completion follows, texts contain special tokens, or the tokenizer does not know the words. The error
            names the first examples concerned.
    """
    if not examples:
        raise ValueError("data: expected at least one example, found none")
    starts = range(0, len(examples), TOKENISE_EXAMPLES_PER_TASK)
    spans = [range(start, min(start + TOKENISE_EXAMPLES_PER_TASK, len(examples))) for start in starts]

    controls = _controls(control)

    def tokenised(examples: Sequence[Example], key: str | None) -> Table:
        table = store.table(key, partial(_tokenised, examples, tokens, controls), spans)
        tokens.check_notes([notes["refused"] for notes in table.notes], len(examples))
        check_known([notes["unknown"] for notes in table.notes], tokens.tokenizer, examples[0].id)
        return table

    # Examples without a key come from Python, not from files. Their table is not cached and stays in memory.
    key = f"{examples.key}-{tokens.key}" if isinstance(examples, Examples) and examples.key else None
    if key and any(controls.values()):
        key += "-" + hashlib.sha256(repr(controls).encode()).hexdigest()[:8]
    table = tokenised(examples, key)
    partners = mismatched = None
    if mismatched_seed is not None:
        groups = in_order(table.numbers("prompt_digest"))
        partners = np.frombuffer(derangement(groups, mismatched_seed), dtype=np.int64)
        if not _independent(table.notes):
            mismatched = tokenised(_Mismatched(examples, partners), key and f"{key}-mismatched-{mismatched_seed}")
    rows = TokenRows(table, tokens, control, partners, mismatched)
    report: Counter[str] = Counter()
    truncated: Counter[tuple[str, str]] = Counter()
    for reason, counts in rows.cut().items():
        report[reason] += int(counts.sum())
        places = np.flatnonzero(counts)
        for name, count in zip(rows.ids(places), counts[places].tolist(), strict=True):
            truncated[reason, origin(name)] += count
    completion_sizes = np.concatenate(rows.sizes(mismatched=False))
    lengths = {"prompt (tokens)": rows.prompt_sizes, "completion (tokens)": completion_sizes}
    return SplitRows(rows, +report, truncated, lengths)


def few_rows(
    examples: Sequence[Example], partners: Sequence[Example], tokens: ChatTokens, control: Control
) -> tuple[list[Row], Counter[str]]:
    """Make the rows of a few examples in memory; they are the same as those of :func:`make_rows`.

    Args:
        examples: n examples.
        partners: for each example, the one whose completion is its mismatched completion; empty: no mismatched
            completions.
        tokens: has the tokenizer and the limits.
        control: see :data:`Control`.

    Returns:
        n rows, and counts of what was truncated in them.

    Raises:
        ValueError: see :func:`make_rows`.
    """
    # A partner is often one of the examples. Examples are compared by identity, not by id, because a stream repeats ids
    # in every pass.
    object_ids = {id(example) for example in examples}
    everything = [*examples, *(partner for partner in partners if id(partner) not in object_ids)]
    table, indices, mismatched = _table(everything, tokens, control), None, None
    if partners:
        places = {id(example): place for place, example in enumerate(everything)}
        indices = np.array([places[id(partner)] for partner in partners])
        if not _independent(table.notes):
            mismatched = _table(_Mismatched(everything, indices)[:], tokens, control)
    rows = TokenRows(table, tokens, control, indices, mismatched)
    cut = {reason: int(counts[: len(examples)].sum()) for reason, counts in rows.cut().items()}
    return rows.many(np.arange(len(examples))), Counter(cut)


class _Mismatched(Stored[Example]):
    """Examples with the completions of their partners."""

    def __init__(self, examples: Sequence[Example], partners: np.ndarray) -> None:
        self.examples, self.partners = examples, partners

    def __len__(self) -> int:
        return len(self.partners)

    def many(self, indices: np.ndarray) -> list[Example]:
        examples, partners = (_many(self.examples, places) for places in (indices, self.partners[indices]))
        return list(map(_with_completion_of, examples, partners))


def _with_completion_of(example: Example, other: Example) -> Example:
    """Return an example with its own prompt and the completion (or the step) of another example."""
    text = replies_of(other)[0]
    if isinstance(example, Labelled):
        step = other.step if isinstance(other, Labelled) else None
        return replace(example, completion=text, step=step)
    return replace(example, chosen=text) if isinstance(example, Pair) else replace(example, completion=text)


def _many(examples: Sequence[Example], places: np.ndarray) -> list[Example]:
    return examples.many(places) if isinstance(examples, Stored) else [examples[int(place)] for place in places]


def _independent(notes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the ids of every completion are the same after every prompt.

    This holds if the template writes the same text before and after all replies, and all prompts have the same text
    after their last safe split (README.md in this folder).
    """
    shapes = {shape if shape is None else tuple(shape) for part in notes for shape in part["shapes"]}
    around = {None if shape is None else shape[0] for shape in shapes}
    treatments = {shape[1] for shape in shapes if shape} - {""}
    return None not in around and len(around) == 1 and len(treatments) <= 1


def _controls(control: Control) -> Controls:
    return {label: control(label) for label in (True, False, None)}


def _table(examples: Sequence[Example], tokens: ChatTokens, control: Control) -> Table:
    refusals, shapes = Refusals(), set[Shape | None]()
    batch = token_batch(examples, tokens, _controls(control), refusals, shapes)
    tokens.check_notes([refusals.notes()], len(examples))
    return Table([batch], [{"shapes": list(shapes)}])


def _tokenised(examples: Sequence[Example], tokens: ChatTokens, controls: Controls, span: range) -> Part:
    """Yield the table's batches for the examples of one task, and return their digest for the table's notes."""
    content, refusals, shapes = hashlib.sha256(), Refusals(), set[Shape | None]()
    unknown: list[tuple[int, int]] = []
    for start in range(span.start, span.stop, TOKENISE_EXAMPLES_PER_BATCH):
        part = examples[start : min(start + TOKENISE_EXAMPLES_PER_BATCH, span.stop)]
        batch = token_batch(part, tokens, controls, refusals, shapes)
        for name in ("prompt", *BRANCHES, "context", "step", "label", "score", "weight", "graded"):
            column = batch.column(name)
            # The offsets are hashed too: without them, moving ids from one row to the next would not change the digest.
            for values in (column.offsets, column.values) if pa.types.is_list(column.type) else (column,):
                content.update(values.to_numpy().tobytes())
        columns = [batch.column(name) for name in ("prompt", *BRANCHES)]
        unknown.append(count_unknown(columns, unknown_id(tokens.tokenizer)))
        yield batch
    # A shape is a digest and a treatment. A digest has up to three treatments, so if there are more than MAX_SHAPES
    # shapes, those that are kept have several digests, and then ids depend on the prompt whatever the other shapes are.
    first_shapes = sorted(shapes, key=str)[:MAX_SHAPES]
    counts = [sum(numbers) for numbers in zip(*unknown, strict=True)]
    return {"digest": content.hexdigest(), "refused": refusals.notes(), "shapes": first_shapes, "unknown": counts}


def token_batch(
    examples: Sequence[Example], tokens: ChatTokens, controls: Controls, refusals: Refusals, shapes: set[Shape | None]
) -> pa.RecordBatch:
    """The untruncated token ids of examples, as a batch with the columns :data:`COLUMNS`.

    Args:
        examples: the examples.
        tokens: tokenises them.
        controls: the control text for each label.
        refusals: receives what was refused.
        shapes: receives the shapes of the completions.
    """
    labels = [_label(example) for example in examples]
    for example in examples:
        check_written(tokens.tokenizer, example.id, example.prompt, replies_of(example))
    tokenised = tokens.tokenise(
        [
            Exchange(example.id, example.prompt, replies_of(example), controls[label], _step_of(example))
            for example, label in zip(examples, labels, strict=True)
        ]
    )
    for one in tokenised:
        refusals.add(one.refusals)
        shapes.update(one.shapes)
    spans = [_step_span(example, one) for example, one in zip(examples, tokenised, strict=True)]
    values: dict[str, Sequence[object]] = {
        "id": [example.id for example in examples],
        "prompt": [one.prompt for one in tokenised],
        "first": [one.completions[0][: span and span[1]] for one, span in zip(tokenised, spans, strict=True)],
        "second": [_second(one) for one in tokenised],
        "context": [_context(one) for one in tokenised],
        "prompt_digest": [digest(prompt_key(example.prompt)) for example in examples],
        "conversation_digest": [digest(conversation_key(example.prompt)) for example in examples],
        "step": [-1 if span is None else span[0] for span in spans],
        "label": [-1 if label is None else int(label) for label in labels],
        "score": [e.score if isinstance(e, Scored) else float("nan") for e in examples],
        "weight": [example.weight for example in examples],
        "graded": [_graded(example) if isinstance(example, Pair) else [] for example in examples],
    }
    arrays = [pa.array(values[name], kind) for name, kind in COLUMNS.items()]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(list(COLUMNS.items())))


def _context(tokenised: Tokenised) -> list[int]:
    return [number for branch, spans in enumerate(tokenised.context) for span in spans for number in (branch, *span)]


def _step_of(example: Example) -> tuple[int, ...]:
    return (example.step or ()) if isinstance(example, Labelled) else ()


def _step_span(example: Example, tokenised: Tokenised) -> tuple[int, int] | None:
    """Return the range of a step's tokens in its completion; None for a whole completion, or a refused one.

    A token belongs to the step in which its last character is. What the template writes before a reply belongs to the
    first step, and what it writes after it, such as the token that ends the turn, to the last one.
    """
    if not isinstance(example, Labelled) or example.step is None or not tokenised.stops:
        return None
    start, stop = tokenised.stops
    return start, len(tokenised.completions[0]) if example.step[1] == len(str(example.completion)) else stop


def _second(tokenised: Tokenised) -> list[int]:
    return tokenised.completions[1] if len(tokenised.completions) > 1 else []


def _label(example: Example) -> bool | None:
    # A scored example's label is the sign of its score; metrics sort rewards by it.
    if isinstance(example, Scored):
        return example.score > 0
    return example.desirable if isinstance(example, Labelled) else None


def _graded(pair: Pair) -> list[float]:
    values = [getattr(pair, name) for name in GRADED]
    return [] if values == [None] * len(GRADED) else [float("nan") if value is None else value for value in values]


def replies_of(example: Example) -> tuple[Reply, ...]:
    """The example's completions, the chosen one of a pair first."""
    return (example.chosen, example.rejected) if isinstance(example, Pair) else (example.completion,)
