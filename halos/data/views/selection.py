"""Which of the feedback is used: labels and pairs from scores, imbalance, one completion per prompt.

Scores become labels and pairs before the view; what is kept is drawn from the view's training examples.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations, pairwise
from typing import Any

import numpy as np

from halos.data.records.record import Completion, Record
from halos.data.records.table import Judged, Judgement, RecordTable, batches, digest, judgement_of, table_of
from halos.data.store.arrow import Part, Store
from halos.data.views.derive import Examples, Prepare, demonstrated

TOO_CLOSE = "completions with close scores left out"
EXPANDED = 4096
"""Records expanded at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Args:
    keep_desirable, keep_undesirable: share of the labelled training completions kept (the KTO paper drops up to 90% of
        the desirable ones, section 4.2 of its first version).
    one_per_prompt: keep one training example of each prompt (the paper's "one y per x").
    labels_from_scores: a completion without a label that scores above this is desirable, below it undesirable; one
        that scores just this stays without: a number, ``median`` (of all training scores) or ``prompt`` (the
        median of its own prompt's).
    pairs_from_scores: of completions of one record that have nothing but scores: ``best_worst`` pairs the best
        with the worst, ``all`` every two.
    min_margin: the least difference of scores in such a pair; equal scores never make one.
    """

    keep_desirable: float = 1.0
    keep_undesirable: float = 1.0
    one_per_prompt: bool = False
    labels_from_scores: float | str | None = None
    pairs_from_scores: str = "best_worst"
    min_margin: float = 0.0

    def __post_init__(self) -> None:
        for name in ("keep_desirable", "keep_undesirable"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"data.select.{name}: expected a share in (0, 1], found {getattr(self, name)!r}")
        if isinstance(self.labels_from_scores, str) and self.labels_from_scores not in ("median", "prompt"):
            raise ValueError(
                "data.select.labels_from_scores: expected a number, median, prompt or null, found "
                f"{self.labels_from_scores!r}"
            )
        if self.pairs_from_scores not in ("best_worst", "all"):
            raise ValueError(
                f"data.select.pairs_from_scores: expected best_worst or all, found {self.pairs_from_scores!r}"
            )
        if self.min_margin < 0:
            raise ValueError(f"data.select.min_margin: expected 0 or more, found {self.min_margin}")

    def check(self, view: str) -> None:
        """Raises ``ValueError`` for settings that have no meaning for a view."""
        if view != "binary" and (self.keep_desirable < 1 or self.keep_undesirable < 1):
            raise ValueError(
                "data.select.keep_desirable and keep_undesirable are for losses that learn from labels; "
                f"this one learns from {view}"
            )

    def prepare(self, view: str, records: Sequence[Record], training: Sequence[Record]) -> Prepare | None:
        """How scores become labels (binary view) or pairs (pairs), None if they do not; ``training`` are the records
        that set the median."""
        if view == "binary" and self.labels_from_scores is not None:
            threshold = self._threshold(table_of(records), table_of(training))
            return lambda index, judgement: _labelled(judgement, threshold(index))
        return self._prepare_pairs(view)

    def _prepare_pairs(self, view: str) -> Prepare | None:
        if view == "pairs" and (self.pairs_from_scores == "all" or self.min_margin):
            return lambda _, judgement: self._paired(judgement)
        return None

    def check_stream(self) -> None:
        """Raises ``ValueError`` for settings that need all of the data at once."""
        if self.labels_from_scores == "median":
            raise ValueError(
                "data.select.labels_from_scores: expected a number or prompt with data.streaming=true, found median, "
                "which is that of all training scores"
            )

    def prepare_run(self, view: str, run: Sequence[Record]) -> Prepare | None:
        """:meth:`prepare` of a few records that have one prompt."""
        if view != "binary" or self.labels_from_scores is None:
            return self._prepare_pairs(view)
        scores = [c.score for record in run for c in record.completions if c.score is not None]
        threshold = float(np.median(scores)) if scores else None
        if self.labels_from_scores != "prompt":
            threshold = float(self.labels_from_scores)
        return lambda _, judgement: _labelled(judgement, threshold)

    def keep_of_run(self, examples: Sequence[Any], seed: int) -> tuple[list[Any], Counter[str]]:
        """The examples that are kept of those of one prompt, and how many of which kind were not.

        Each has a draw of its own, from the seed and its id: shares are kept on average, and the same ones every time.
        """
        report: Counter[str] = Counter()
        kept = []
        for example in examples:
            kind: bool | None = getattr(example, "desirable", None)
            share = 1.0 if kind is None else self.keep_desirable if kind else self.keep_undesirable
            if share == 1 or digest("share", str(seed), example.id) < share * 2**64:
                kept.append(example)
            else:
                report[f"{'desirable' if kind else 'undesirable'} completions not kept"] += 1
        if self.one_per_prompt and kept:
            report["further examples of a prompt not kept"] += len(kept) - 1
            kept = [min(kept, key=lambda example: digest("one", str(seed), example.id))]
        return kept, +report

    def keep(self, examples: Examples[Any], seed: int) -> tuple[Examples[Any], Counter[str]]:
        """The training examples that are kept, in their order, and how many of which kind were not."""
        report: Counter[str] = Counter()
        kept = np.ones(len(examples), dtype=bool)
        labels = examples.labels
        for desirable, share in ((True, self.keep_desirable), (False, self.keep_undesirable)):
            if share < 1 and labels is not None:
                kind = np.flatnonzero(labels == desirable)
                count = len(kind) - max(1, round(share * len(kind))) if len(kind) else 0
                kept[random.Random(seed).sample(kind.tolist(), max(0, count))] = False
                report[f"{'desirable' if desirable else 'undesirable'} completions not kept"] += count
        if self.one_per_prompt:
            left = np.flatnonzero(kept)
            chosen = left[_one_of_each(examples.prompts[left], random.Random(seed))]
            report["further examples of a prompt not kept"] += len(left) - len(chosen)
            kept[:] = False
            kept[chosen] = True
        return (examples if kept.all() else examples.take(np.flatnonzero(kept))), +report

    def _threshold(self, records: RecordTable, training: RecordTable) -> Callable[[int], float | None]:
        if self.labels_from_scores == "prompt":
            owner, scores = _scores(records)
            prompts, member = np.unique(records.numbers("prompt"), return_inverse=True)
            medians = _medians(member[owner], scores, len(prompts))
            return lambda index: medians[member[index]]
        if self.labels_from_scores == "median":
            _, scores = _scores(training)
            fixed = float(np.median(scores)) if len(scores) else None
        else:
            fixed = float(self.labels_from_scores or 0.0)
        return lambda _: fixed

    def _paired(self, record: Judgement) -> tuple[Judgement, Counter[str]]:
        report: Counter[str] = Counter()
        paired = set(chain(*record.preferences))
        alone = [i for i, c in enumerate(record.completions) if i not in paired and c.desirable is None]
        scores = {i: score for i in alone if (score := record.completions[i].score) is not None}
        ranked = sorted(scores, key=lambda i: (-scores[i], i))
        couples = (
            combinations(ranked, 2) if self.pairs_from_scores == "all" else [(ranked[0], ranked[-1])][: len(ranked) - 1]
        )
        made = [(i, j) for i, j in couples if scores[i] > scores[j] and scores[i] - scores[j] >= self.min_margin]
        gone = set(ranked).difference(chain(*made))
        report["pairs from scores"] += len(made)
        report[TOO_CLOSE] += len(gone)
        position = {old: new for new, old in enumerate(i for i in range(len(record.completions)) if i not in gone)}
        kept = tuple(record.completions[i] for i in position)
        preferences = tuple((position[i], position[j]) for i, j in (*record.preferences, *made))
        return Judgement(kept, preferences), report


def expand_turns(records: RecordTable, store: Store) -> tuple[RecordTable, Counter[str]]:
    """Each record that has something to imitate after one for every earlier assistant's turn of its prompt, so that all
    turns are trained on.

    A turn that nothing asks for (the first of the conversation, or one after another assistant's turn) and an empty
    one are counted, not trained on. Scored tokens are those of one row with every assistant's turn scored; what the
    turns share is computed for each of them.
    """
    spans = [range(start, min(start + EXPANDED, len(records))) for start in range(0, len(records), EXPANDED)]
    key = None if records.key is None else f"{records.key}-turns"
    table = store.table(key, partial(_expanded, records), spans)
    return RecordTable(table), sum((Counter(notes) for notes in table.notes), Counter())


def _expanded(records: RecordTable, span: range) -> Part:
    report: Counter[str] = Counter()

    found = records.many(np.array(span))
    yield from batches((None, made) for record in found for made in with_turns(record, report))
    return dict(report)


def with_turns(record: Record, report: Counter[str]) -> list[Record]:
    """The record after one for each earlier assistant's turn, see :func:`expand_turns`."""
    if isinstance(record.prompt, str) or not demonstrated(judgement_of(record), Counter()):
        return [record]
    found = []
    for n, turn in enumerate(record.prompt):
        if turn.role != "assistant":
            continue
        if n == 0 or record.prompt[n - 1].role == "assistant" or not turn.content.strip():
            report["earlier assistant turns left out"] += 1
            continue
        report["earlier assistant turns"] += 1
        found.append(Record(f"{record.id}.{n}", record.prompt[:n], (Completion(turn.content),)))
    return [*found, record]


def _one_of_each(prompts: np.ndarray, rng: random.Random) -> np.ndarray:
    """A place of each prompt, drawn from all that it has; prompts in the order in which they first come."""
    _, first, counts = np.unique(prompts, return_index=True, return_counts=True)
    order = np.argsort(first)
    members = np.argsort(prompts, kind="stable")
    starts = (np.cumsum(counts) - counts)[order]
    return members[starts + [rng.randrange(count) for count in counts[order].tolist()]]


def _labelled(record: Judgement, threshold: float | None) -> tuple[Judgement, Counter[str]]:
    report: Counter[str] = Counter()

    def judge(completion: Judged) -> Judged:
        score = completion.score
        if threshold is None or score is None or completion.desirable is not None or score == threshold:
            return completion
        report["labels from scores"] += 1
        return replace(completion, desirable=score > threshold)

    return replace(record, completions=tuple(map(judge, record.completions))), report


def _scores(records: RecordTable) -> tuple[np.ndarray, np.ndarray]:
    """(the record of each, the scores) of all completions that have one."""
    owner, scores = records.lists("scores")
    known = ~np.isnan(scores)
    return owner[known], scores[known]


def _medians(groups: np.ndarray, values: np.ndarray, count: int) -> list[float | None]:
    """The median of the values of each of ``count`` groups."""
    order = np.lexsort((values, groups))
    edges = np.searchsorted(groups[order], np.arange(count + 1))
    ordered = values[order]
    return [float(np.median(ordered[a:z])) if z > a else None for a, z in pairwise(edges)]
