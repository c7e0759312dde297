"""Records and examples as JSON lines in this project's format, which :mod:`halos.data.sources.feedback_files` reads."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from halos.data.records.record import Completion, Conversation, Message, Prompt, Record, Reply, messages_of
from halos.data.views.examples import Example, Labelled, Pair, Scored
from halos.files import atomic_file

Row = dict[str, object]


def record_row(record: Record) -> Row:
    """Return a record as an object of this project's format."""
    completions: list[Row] = []
    for completion in record.completions:
        judged = {"desirable": completion.desirable, "score": completion.score}
        row = _reply(completion.reply) | {k: v for k, v in judged.items() if v is not None}
        completions.append(row | ({"steps": _steps(completion)} if completion.steps else {}))
    row = {"id": record.id, **_prompt(record.prompt), "completions": completions}
    row |= {"preferences": [list(pair) for pair in record.preferences]} if record.preferences else {}
    row |= {} if record.weight == 1 else {"weight": record.weight}
    return row if record.margin is None else {**row, "margin": record.margin}


def example_row(example: Example) -> Row:
    """Return an example of a view as an object of this project's format."""
    if isinstance(example, Labelled) and example.step is not None:
        raise ValueError("convert: expected view=null or another view, found steps; records keep labels of steps")
    if isinstance(example, Pair):
        chosen = Completion.of(example.chosen, score=example.score_chosen)
        rejected = Completion.of(example.rejected, score=example.score_rejected)
        judged = Record(example.id, example.prompt, (chosen, rejected), ((0, 1),), example.weight, example.margin)
        return record_row(judged)
    label = example.desirable if isinstance(example, Labelled) else None
    score = example.score if isinstance(example, Scored) else None
    completion = Completion.of(example.completion, label, score)
    return record_row(Record(example.id, example.prompt, (completion,), weight=example.weight))


def _prompt(prompt: Prompt) -> Row:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    row: Row = {"prompt": [_turn(turn) for turn in messages_of(prompt)]}
    if isinstance(prompt, Conversation):
        # As texts: as objects they would lose nulls, which the reader takes for a table's.
        row |= {"tools": prompt.tools} if prompt.tools else {}
        row |= {"chat_template_kwargs": prompt.template_kwargs} if prompt.template_kwargs else {}
    return row


def _reply(reply: Reply) -> Row:
    return {"text": reply} if isinstance(reply, str) else {"messages": [_turn(turn) for turn in reply]}


def _steps(completion: Completion) -> list[Row]:
    rows, start = list[Row](), 0
    for step in completion.steps:
        text: Row = {"text": completion.text[start : step.stop]}
        rows.append(text if step.desirable is None else {**text, "label": step.desirable})
        start = step.stop
    return rows


def _turn(turn: Message) -> Row:
    row = turn.as_dict() if turn.weight else {**turn.as_dict(), "weight": 0}
    if isinstance(calls := row.get("tool_calls"), list):
        row["tool_calls"] = [_call(call) for call in calls]
    return row


def _call(call: Row) -> Row:
    """Return a tool call with its arguments as text, in which they keep their nulls; see :func:`_prompt`."""
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": _call(function)}
    return {**call, "arguments": json.dumps(call["arguments"])} if isinstance(call.get("arguments"), dict) else call


def write_jsonl(file: Path, rows: Iterable[Mapping[str, object]]) -> int:
    """Write rows to a file, which appears complete or not at all.

    Args:
        file: the name; it ends in .jsonl or .jsonl.gz.
        rows: the objects, one for each line.

    Returns:
        The number of rows.

    Raises:
        ValueError: for another name.
    """
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"convert: expected a file that ends in .jsonl or .jsonl.gz, found {file}")
    file.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    # Rows may come from a generator that fails at one of them: the file appears only once all are written.
    with atomic_file(file) as part:
        open_text = gzip.open if file.suffix == ".gz" else open
        with open_text(part, "wt", encoding="utf-8") as stream:
            for row in rows:
                # Without NaN and Infinity, which Python writes but JSON does not have: strict readers refuse them.
                stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                count += 1
    return count
