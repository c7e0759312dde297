"""Training on every assistant turn of a conversation: a record for each earlier turn of a prompt."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np

from halos.data.records.judgement import judgement_of
from halos.data.records.record import Completion, Message, Record, messages_of, turns_of_reply, with_messages
from halos.data.records.table import RecordTable, batches
from halos.data.store.arrow import Part, Store
from halos.data.views.rules import demonstrated

RECORDS_PER_TASK = 4096


def expand_turns(records: RecordTable, store: Store) -> tuple[RecordTable, Counter[str]]:
    """Put a record for each earlier assistant turn of its prompt before each record that has something to imitate.

    The scored tokens are those of one row in which every assistant turn is scored; the shared turns are computed once
    for each record.

    Returns:
        The records with the new ones, and counts of earlier turns, used and left out: a turn that answers nothing
        (the first of the conversation, or one after another assistant turn), an empty turn and one of weight 0 are not
        trained on.
    """
    starts = range(0, len(records), RECORDS_PER_TASK)
    spans = [range(start, min(start + RECORDS_PER_TASK, len(records))) for start in starts]
    # The records have a key of their contents, so that the expanded table is found again for the same ones.
    key = None if records.key is None else f"{records.key}-turns"
    table = store.table(key, partial(_expanded, records), spans)
    return RecordTable(table), sum((Counter(notes) for notes in table.notes), Counter())


def _expanded(records: RecordTable, span: range) -> Part:
    report: Counter[str] = Counter()
    conversations = records.many(np.array(span))
    yield from batches((None, turn) for record in conversations for turn in with_turns(record, report))
    return dict(report)


def with_turns(record: Record, report: Counter[str]) -> list[Record]:
    """Return a record for each earlier assistant turn, then the record itself; see :func:`expand_turns`.

    If a reply has several turns, a record for each reply to imitate replaces it, with its last turn as the completion.
    """
    # The turns of a rejected conversation may be what it was rejected for.
    imitated = [place for place, _, _ in demonstrated(judgement_of(record), Counter())]
    if not imitated:
        return [record]
    prompt = tuple(messages_of(record.prompt))
    earlier = _earlier(record, record.id, prompt, 0, report)
    if all(len(record.completions[place].turns) < 2 for place in imitated):
        return [*earlier, record]
    for place in imitated:
        completion = record.completions[place]
        *before, last = turns_of_reply(completion.reply)
        turns, name = (*prompt, *before), f"{record.id}/{place}"
        earlier += _earlier(record, name, turns, len(prompt), report)
        earlier.append(_with_last(record, name, turns, last))
    return earlier


def _earlier(record: Record, name: str, turns: tuple[Message, ...], start: int, report: Counter[str]) -> list[Record]:
    """Return a record for each assistant turn from ``start`` on; their ids begin with ``name``."""
    records = []
    for n, turn in enumerate(turns[start:], start):
        if turn.role != "assistant":
            continue
        if not turn.weight:
            report["earlier assistant turns of weight 0 left out"] += 1
            continue
        if n == 0 or turns[n - 1].role == "assistant" or not turn.text.strip():
            report["earlier assistant turns left out"] += 1
            continue
        report["earlier assistant turns"] += 1
        records.append(_with_last(record, f"{name}.{n}", turns[:n], turn))
    return records


def _with_last(record: Record, name: str, turns: tuple[Message, ...], last: Message) -> Record:
    """Return a record of other turns with the tools, variables and weight of ``record``."""
    return Record(name, with_messages(record.prompt, turns), (Completion.of((last,)),), weight=record.weight)
