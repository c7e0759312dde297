"""The rule of each view: which examples the judgement of one record gives.

A rule takes a judgement (labels, scores and preferences, no texts) and a counter. It returns the examples as
positions in the judgement, and counts what it converted or left out. The same rules serve tables
(:data:`halos.data.views.derive.VIEWS`) and streams (:func:`halos.data.views.derive.of_run`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

from halos.data.records.judgement import Judged, Judgement


class StepLabel(NamedTuple):
    """The label of a step of a completion.

    Attributes:
        number: the number of the step.
        labelled: the number of labelled steps of the completion.
        desirable: the label.
    """

    number: int
    labelled: int
    desirable: bool


Value = bool | float | StepLabel | None
"""The label or the score of an example; None for views without one."""
LocalExample = tuple[int, int | None, Value]
"""(completion, rejected completion of a pair, label or score); completions are positions in one judgement."""
Rule = Callable[[Judgement, Counter[str]], list[LocalExample]]


def demonstrated(record: Judgement, report: Counter[str]) -> list[LocalExample]:
    """Return the completions of one record that are worth imitating."""
    reasons = [_why_no_demonstration(record, i) for i in range(len(record.completions))]
    report.update(reason for reason in reasons if reason is not None)
    return [(i, None, None) for i, reason in enumerate(reasons) if reason is None]


def _why_no_demonstration(record: Judgement, i: int) -> str | None:
    """Return the reason to leave completion ``i`` out, None if it is worth imitating."""
    completion = record.completions[i]
    in_a_pair = any(i in pair for pair in record.preferences)
    if completion.steps and completion.desirable is None and completion.score is None and not in_a_pair:
        return _without_feedback(completion)
    # An explicit label counts more than a preference: the better of two bad replies stays a bad reply.
    if completion.desirable is not None:
        return None if completion.desirable else "undesirable completions left out"
    if any(i == better for better, _ in record.preferences):
        return None
    if any(i == worse for _, worse in record.preferences):
        return "rejected completions left out"
    return None if completion.score is None or i == _by_score(record)[-1] else "lower-scored completions left out"


def labelled(record: Judgement, report: Counter[str]) -> list[LocalExample]:
    """Return the completions of one record that have a label or are in a pair."""
    examples, without = _labelled(record, report)
    report.update(without.values())
    return examples


def stepped(record: Judgement, report: Counter[str]) -> list[LocalExample]:
    """Return the examples of :func:`labelled`, followed by the steps with a label."""
    examples, without = _labelled(record, report)
    for i, completion in enumerate(record.completions):
        labels = [(number, label) for number, label in enumerate(completion.steps) if label is not None]
        examples += [(i, None, StepLabel(number, len(labels), label)) for number, label in labels]
        report["steps with a label"] += len(labels)
        if labels:
            without.pop(i, None)
    report.update(without.values())
    return examples


def _labelled(record: Judgement, report: Counter[str]) -> tuple[list[LocalExample], dict[int, str]]:
    """Return the examples of :func:`labelled`, and for each other completion why it is not an example."""
    labels = _labels(record, report)
    report["labelled completions from pairs"] += sum(record.completions[i].desirable is None for i, _ in labels)
    without = {}
    for i in sorted(set(range(len(record.completions))) - {i for i, _ in labels}):
        completion = record.completions[i]
        scored = "scored completions without a label left out"
        without[i] = _without_feedback(completion) if completion.score is None else scored
    return [(i, None, desirable) for i, desirable in labels], without


def _without_feedback(completion: Judged) -> str:
    return f"completions {'with labels of steps alone' if completion.steps else 'without feedback'} left out"


def _labels(record: Judgement, report: Counter[str]) -> list[tuple[int, bool]]:
    """Return (completion, desirable): first for the completions of pairs in their order, then for other labelled ones.

    A completion that is better in one pair and worse in another is returned with both labels.
    """
    from_pairs = chain.from_iterable(((better, True), (worse, False)) for better, worse in record.preferences)
    candidates: list[tuple[int, bool | None]] = [*from_pairs, *((i, None) for i in range(len(record.completions)))]
    labels: dict[tuple[int, bool], None] = {}  # an ordered set
    for i, from_pair in candidates:
        own_label = record.completions[i].desirable
        label = from_pair if own_label is None else own_label
        if label is not None:
            labels.setdefault((i, label))
    # The sum counts each contradiction twice, once for either label.
    report["completions both preferred and rejected"] += (
        sum((i, not desirable) in labels for i, desirable in labels) // 2
    )
    return list(labels)


def paired(record: Judgement, report: Counter[str]) -> list[LocalExample]:
    """Return the pairs of one record, followed by its labelled completions that are in no pair, one by one.

    The latter have their label as value. They are paired later, because completions of the same prompt may be in other
    records.
    """
    # A completion in a pair does not use its label as well: that would count its judgement twice.
    examples: list[LocalExample] = [(better, worse, None) for better, worse in record.preferences]
    examples += [(i, None, c.desirable) for i, c in _without_pair(record).items() if c.desirable is not None]
    return examples + _pairs_from_scores(record, report)


def _pairs_from_scores(record: Judgement, report: Counter[str]) -> list[LocalExample]:
    """Among the completions that have only a score, return the best-scored one paired with the worst-scored one."""
    ranked = _by_score(record)
    unjudged = [c for c in _without_pair(record).values() if c.desirable is None and c.score is None]
    report.update(map(_without_feedback, unjudged))
    if len(ranked) < 2:
        report["scored completions with nothing to compare left out"] += len(ranked)
        return []
    worst, best = ranked[0], ranked[-1]
    if record.completions[best].score == record.completions[worst].score:
        report["completions with tied scores left out"] += len(ranked)
        return []
    report["pairs from scores"] += 1
    report["completions with middle scores left out"] += len(ranked) - 2
    return [(best, worst, None)]


def _without_pair(record: Judgement) -> dict[int, Judged]:
    in_pairs = set(chain(*record.preferences))
    return {i: completion for i, completion in enumerate(record.completions) if i not in in_pairs}


def _by_score(record: Judgement) -> list[int]:
    """Return the completions that have only a score, worst first; of equal scores the first completion is the best."""
    scores = {i: c.score for i, c in _without_pair(record).items() if c.desirable is None and c.score is not None}
    return sorted(scores, key=lambda i: (scores[i], -i))


def scored(record: Judgement, report: Counter[str]) -> list[LocalExample]:
    """Return the scored completions of one record, followed by those with ±1 from a label or a pair."""
    # A completion gets its score, else ±1 from its label, else from its pair: the most precise feedback that it has.
    values: list[tuple[int, float]] = [(i, c.score) for i, c in enumerate(record.completions) if c.score is not None]
    have_score = {i for i, _ in values}
    for i, desirable in _labels(record, report):
        if i not in have_score:
            values.append((i, 1.0 if desirable else -1.0))
            has_label = record.completions[i].desirable is not None
            report["scores from labels" if has_label else "scores from pairs"] += 1
    unjudged = set(range(len(record.completions))) - {i for i, _ in values}
    report.update(_without_feedback(record.completions[i]) for i in unjudged)
    return [(i, None, score) for i, score in values]
