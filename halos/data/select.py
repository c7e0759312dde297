"""Which of the feedback is used: labels and pairs from scores, imbalance, one completion per prompt.

Scores become labels and pairs as records, before the view; what is kept is drawn from the view's training examples.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from statistics import median

from halos.data.feedback import Completion, Feedback, prompt_key
from halos.data.rows import Example
from halos.data.views import Demonstration, Labelled

TOO_CLOSE = "completions with close scores left out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Args:
    keep_desirable, keep_undesirable: share of the labelled training completions kept (the KTO paper's section 4.3
        drops up to 95% of the desirable ones).
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

    def prepare(
        self, view: str, records: Sequence[Feedback], training: Sequence[Feedback]
    ) -> tuple[Sequence[Feedback], Counter[str]]:
        """Records whose scores have become labels (binary view) or pairs (pairs), and what that did; ``training`` are
        the records that set the median."""
        report: Counter[str] = Counter()
        if view == "binary" and self.labels_from_scores is not None:
            threshold = self._threshold(records, training)
            return [_labelled(record, threshold(record), report) for record in records], report
        if view == "pairs" and (self.pairs_from_scores == "all" or self.min_margin):
            made = [self._paired(record, report) for record in records]
            return [record for record in made if record is not None], report
        return records, report

    def keep(self, examples: Sequence[Example], seed: int) -> tuple[list[Example], Counter[str]]:
        """The training examples that are kept, in their order, and how many of which kind were not."""
        report: Counter[str] = Counter()
        kept = list(range(len(examples)))
        for desirable, share in ((True, self.keep_desirable), (False, self.keep_undesirable)):
            if share < 1:
                kind = [i for i in kept if (e := examples[i]) and isinstance(e, Labelled) and e.desirable == desirable]
                gone = set(_drawn(kind, len(kind) - max(1, round(share * len(kind))), seed))
                report[f"{'desirable' if desirable else 'undesirable'} completions not kept"] += len(gone)
                kept = [i for i in kept if i not in gone]
        if self.one_per_prompt:
            members: dict[str, list[int]] = defaultdict(list)
            for i in kept:
                members[prompt_key(examples[i].prompt)].append(i)
            rng = random.Random(seed)
            chosen = sorted(rng.choice(group) for group in members.values())
            report["further examples of a prompt not kept"] += len(kept) - len(chosen)
            kept = chosen
        return [examples[i] for i in kept], +report

    def _threshold(
        self, records: Sequence[Feedback], training: Sequence[Feedback]
    ) -> Callable[[Feedback], float | None]:
        if self.labels_from_scores == "prompt":
            scores: dict[str, list[float]] = defaultdict(list)
            for record in records:
                scores[prompt_key(record.prompt)] += _scores([record])
            medians = {key: median(found) for key, found in scores.items() if found}
            return lambda record: medians.get(prompt_key(record.prompt))
        if self.labels_from_scores == "median":
            found = _scores(training)
            fixed = median(found) if found else None
        else:
            fixed = float(self.labels_from_scores or 0.0)
        return lambda record: fixed

    def _paired(self, record: Feedback, report: Counter[str]) -> Feedback | None:
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
        if not position:
            return None
        return replace(
            record,
            completions=tuple(record.completions[i] for i in position),
            preferences=tuple((position[i], position[j]) for i, j in (*record.preferences, *made)),
        )


def expand_turns(examples: Sequence[Demonstration]) -> tuple[list[Demonstration], Counter[str]]:
    """Each demonstration after one for every earlier assistant's turn of its prompt, so that all turns are trained on.

    A turn that nothing asks for (the first of the conversation, or one after another assistant's turn) and an empty
    one are counted, not trained on. Scored tokens are those of one row with every assistant's turn scored; what the
    turns share is computed for each of them.
    """
    expanded: list[Demonstration] = []
    report: Counter[str] = Counter()
    for example in examples:
        turns = () if isinstance(example.prompt, str) else example.prompt
        for n, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            if n == 0 or turns[n - 1].role == "assistant" or not turn.content.strip():
                report["earlier assistant turns left out"] += 1
                continue
            report["earlier assistant turns"] += 1
            expanded.append(Demonstration(f"{example.id}.{n}", turns[:n], turn.content))
        expanded.append(example)
    return expanded, report


def _labelled(record: Feedback, threshold: float | None, report: Counter[str]) -> Feedback:
    def judge(completion: Completion) -> Completion:
        score = completion.score
        if threshold is None or score is None or completion.desirable is not None or score == threshold:
            return completion
        report["labels from scores"] += 1
        return replace(completion, desirable=score > threshold)

    return replace(record, completions=tuple(map(judge, record.completions)))


def _scores(records: Sequence[Feedback]) -> list[float]:
    return [c.score for record in records for c in record.completions if c.score is not None]


def _drawn(found: list[int], count: int, seed: int) -> list[int]:
    return random.Random(seed).sample(found, max(0, count))
