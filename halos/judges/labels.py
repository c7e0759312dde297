"""Feedback from samples and a judge: labels, pairs or scores, in this project's record format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from halos.checks import check_choice
from halos.data.preparation.writing import record_row
from halos.data.records.record import Completion, Record, Reply
from halos.judges.base import CompletionJudge, PromptCompletion

KINDS = ("binary", "pairs", "scores")


def label(records: Sequence[Record], judge: CompletionJudge, kind: str) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Let a judge give feedback on the completions of records.

    Earlier feedback is not kept. Of equal completions of a prompt, one is kept.

    Args:
        records: prompts with their completions.
        judge: gives the feedback.
        kind: ``binary`` labels each completion, ``pairs`` compares every two completions of a prompt and keeps those
            that are not tied, ``scores`` keeps the judge's scores.

    Returns:
        Rows of the record format, and counts of what was labelled and of what was left out.

    Raises:
        ValueError: the kind is unknown, or the judge gave no feedback at all.
    """
    check_choice("feedback", kind, KINDS)
    counts: Counter[str] = Counter(prompts=len(records))
    replies = [list(dict.fromkeys(completion.reply for completion in record.completions)) for record in records]
    counts["repeated completions left out"] = sum(len(r.completions) for r in records) - sum(map(len, replies))
    judged = (_paired if kind == "pairs" else _marked)(records, replies, judge, kind, counts)
    if not judged:
        left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        raise ValueError(f"judge: expected feedback on at least one completion, found none ({left_out})")
    return [record_row(record) for record in judged], +counts


def _marked(
    records: Sequence[Record], replies: list[list[Reply]], judge: CompletionJudge, kind: str, counts: Counter[str]
) -> list[Record]:
    # One call for all records: a judge without a threshold labels by the median of all scores in the call.
    everything: list[PromptCompletion] = [
        (record.prompt, reply)
        for record, record_replies in zip(records, replies, strict=True)
        for reply in record_replies
    ]
    answers = iter(judge.labels(everything) if kind == "binary" else judge.scores(everything))
    judged = []
    for record, record_replies in zip(records, replies, strict=True):
        answered = []
        for reply in record_replies:
            answer = next(answers)
            counts[_outcome(kind, answer)] += 1
            if answer is not None:
                label, score = (bool(answer), None) if kind == "binary" else (None, answer)
                answered.append(Completion.of(reply, label, score))
        if answered:
            judged.append(Record(record.id, record.prompt, tuple(answered), weight=record.weight))
    return judged


def _outcome(kind: str, answer: float | None) -> str:
    if answer is None:
        return "completions without an answer left out"
    if kind == "scores":
        return "scored"
    return "desirable" if answer else "undesirable"


def _paired(
    records: Sequence[Record], replies: list[list[Reply]], judge: CompletionJudge, kind: str, counts: Counter[str]
) -> list[Record]:
    # All duels in one call, so that a chat judge sends its requests concurrently.
    places = [
        (n, i, j) for n, record_replies in enumerate(replies) for i, j in combinations(range(len(record_replies)), 2)
    ]
    verdicts = judge.verdicts([(records[n].prompt, replies[n][i], replies[n][j]) for n, i, j in places])
    preferences: dict[int, list[tuple[int, int]]] = {}
    for (n, i, j), verdict in zip(places, verdicts, strict=True):
        if verdict is None:
            counts["duels without an answer left out"] += 1
        elif verdict in (0.0, 1.0):
            counts["pairs"] += 1
            preferences.setdefault(n, []).append((i, j) if verdict else (j, i))
        else:
            counts["ties left out"] += 1
    counts["prompts without a pair left out"] = len(records) - len(preferences)
    return [_with_preferences(records[n], replies[n], pairs) for n, pairs in preferences.items()]


def _with_preferences(record: Record, replies: list[Reply], pairs: list[tuple[int, int]]) -> Record:
    """The record with only the completions that are in a pair, and pairs of indices into these."""
    used = sorted({place for pair in pairs for place in pair})
    completions = tuple(Completion.of(replies[place]) for place in used)
    preferences = tuple((used.index(better), used.index(worse)) for better, worse in pairs)
    return Record(record.id, record.prompt, completions, preferences, record.weight)
