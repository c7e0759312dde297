"""From samples and a judge to feedback: labels, pairs or scores, in this project's record format."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from halos.data.records.record import Record
from halos.judges.base import CompletionJudge
from halos.sampling.sampler import as_json

KINDS = ("binary", "pairs", "scores")


def label(records: Sequence[Record], judge: CompletionJudge, kind: str) -> tuple[list[dict[str, Any]], Counter[str]]:
    """(rows with the judge's feedback, counts of what was labelled and of what was left out).

    ``binary`` marks each completion, ``pairs`` lists every two of a prompt that the judge tells apart, ``scores`` keeps
    the judge's own numbers. Earlier feedback is not carried over; of equal completions of a prompt one is kept.
    Raises ``ValueError`` if nothing is left.
    """
    if kind not in KINDS:
        raise ValueError(f"feedback: expected one of {', '.join(KINDS)}; found {kind!r}")
    counts: Counter[str] = Counter(prompts=len(records))
    texts = [list(dict.fromkeys(completion.text for completion in record.completions)) for record in records]
    counts["repeated completions left out"] = sum(len(r.completions) for r in records) - sum(map(len, texts))
    rows = {"binary": _marked, "scores": _scored, "pairs": _paired}[kind](records, texts, judge, counts)
    if not rows:
        left_out = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        raise ValueError(f"judge: expected feedback on at least one completion, found none ({left_out})")
    return rows, +counts


def _marked(records: Any, texts: list[list[str]], judge: CompletionJudge, counts: Counter[str]) -> list[dict[str, Any]]:
    labels = iter(judge.labels(_said(records, texts)))
    return _rows(records, texts, "desirable", labels, counts)


def _scored(records: Any, texts: list[list[str]], judge: CompletionJudge, counts: Counter[str]) -> list[dict[str, Any]]:
    scores = iter(judge.scores(_said(records, texts)))
    return _rows(records, texts, "score", scores, counts)


def _rows(
    records: Sequence[Record], texts: list[list[str]], name: str, answers: Any, counts: Counter[str]
) -> list[dict[str, Any]]:
    rows = []
    for record, some in zip(records, texts, strict=True):
        answered = [(text, next(answers)) for text in some]
        kept = [{"text": text, name: answer} for text, answer in answered if answer is not None]
        counts["completions without an answer left out"] += len(some) - len(kept)
        for completion in kept:
            counts[_word(name, completion[name])] += 1
        if kept:
            rows.append({"id": record.id, "prompt": as_json(record.prompt), "completions": kept})
    return rows


def _word(name: str, answer: Any) -> str:
    return "scored" if name == "score" else ("desirable" if answer else "undesirable")


def _paired(records: Any, texts: list[list[str]], judge: CompletionJudge, counts: Counter[str]) -> list[dict[str, Any]]:
    places = [
        (n, i, j) for n, some in enumerate(texts) for i, j in itertools.combinations(range(len(some)), 2)
    ]  # fmt: skip
    verdicts = judge.verdicts([(records[n].prompt, texts[n][i], texts[n][j]) for n, i, j in places])
    preferences: dict[int, list[list[int]]] = {}
    for (n, i, j), verdict in zip(places, verdicts, strict=True):
        if verdict in (0.0, 1.0):
            preferences.setdefault(n, []).append([i, j] if verdict else [j, i])
        counts["pairs" if verdict in (0.0, 1.0) else _why(verdict)] += 1
    counts["prompts without a pair left out"] = len(records) - len(preferences)
    return [
        {
            "id": records[n].id,
            "prompt": as_json(records[n].prompt),
            "completions": [{"text": texts[n][i]} for i in used],
            "preferences": [[used.index(better), used.index(worse)] for better, worse in found],
        }
        for n, found in preferences.items()
        for used in [sorted({i for pair in found for i in pair})]
    ]


def _why(verdict: float | None) -> str:
    return "duels without an answer left out" if verdict is None else "ties left out"


def _said(records: Sequence[Record], texts: list[list[str]]) -> list[Any]:
    return [(record.prompt, text) for record, some in zip(records, texts, strict=True) for text in some]
