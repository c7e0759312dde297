"""What an objective eats, derived from feedback records: demonstrations, labelled completions, pairs, scores.

Conversions are explicit: a view's ``report`` counts what was converted and what was left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

from halos.data.feedback import Completion, Feedback, Prompt, prompt_key


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A completion to imitate."""

    id: str
    prompt: Prompt
    completion: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A completion that is desirable or not."""

    id: str
    prompt: Prompt
    completion: str
    desirable: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt, the first preferred to the second."""

    id: str
    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Scored:
    """A completion with its reward."""

    id: str
    prompt: Prompt
    completion: str
    score: float


E = TypeVar("E", Demonstration, Labelled, Pair, Scored)


@dataclass(frozen=True, slots=True)
class View(Generic[E]):
    """Examples in the order of their records, and how often something was converted or left out.

    An example's id is its record's with ``#`` and the number of the example in that record.
    """

    examples: list[E]
    report: Counter[str]


def demonstrations(records: Sequence[Feedback]) -> View[Demonstration]:
    """Preferred, desirable, best-scored and unjudged completions."""
    examples: list[Demonstration] = []
    report: Counter[str] = Counter()
    for record in records:
        reasons = [_why_no_demonstration(record, i) for i in range(len(record.completions))]
        report.update(reason for reason in reasons if reason is not None)
        kept = [c for c, reason in zip(record.completions, reasons, strict=True) if reason is None]
        examples += [Demonstration(f"{record.id}#{n}", record.prompt, c.text) for n, c in enumerate(kept)]
    if not examples:
        raise ValueError(f"no completion is preferred, desirable or unjudged: nothing to imitate{_left_out(report)}")
    return View(examples, report)


def _why_no_demonstration(record: Feedback, i: int) -> str | None:
    """The reason to leave completion ``i`` out, None if it is one to imitate."""
    completion = record.completions[i]
    if completion.desirable is not None:
        return None if completion.desirable else "undesirable completions left out"
    if any(i == better for better, _ in record.preferences):
        return None
    if any(i == worse for _, worse in record.preferences):
        return "rejected completions left out"
    return None if completion.score is None or i == _by_score(record)[-1] else "lower-scored completions left out"


def binary(records: Sequence[Feedback]) -> View[Labelled]:
    """Labels where there are any; otherwise a pair gives a desirable and an undesirable completion."""
    examples: list[Labelled] = []
    report: Counter[str] = Counter()
    for record in records:
        labels = _labels(record, report)
        for n, (i, desirable) in enumerate(labels):
            examples.append(Labelled(f"{record.id}#{n}", record.prompt, record.completions[i].text, desirable))
            report["labelled completions from pairs"] += record.completions[i].desirable is None
        for i in sorted(set(range(len(record.completions))) - {i for i, _ in labels}):
            report[_unlabelled(record.completions[i])] += 1
    if not examples:
        raise ValueError(
            "no completion has a label or stands in a pair: the loss needs desirable and undesirable completions; "
            "scores are not labels, they need a threshold: write 'desirable' for each completion"
            if report["scored completions without a label left out"]
            else f"no completion has a label or stands in a pair: nothing to learn from{_left_out(report)}"
        )
    return View(examples, +report)


def _labels(record: Feedback, report: Counter[str]) -> list[tuple[int, bool]]:
    """(completion, desirable) for all that have a label or a pair, pair by pair, then the others."""
    implied = chain.from_iterable(((better, True), (worse, False)) for better, worse in record.preferences)
    candidates: list[tuple[int, bool | None]] = [*implied, *((i, None) for i in range(len(record.completions)))]
    found: dict[tuple[int, bool], None] = {}
    for i, from_pair in candidates:
        label = record.completions[i].desirable
        label = from_pair if label is None else label
        if label is not None:
            found.setdefault((i, label))
    report["completions both preferred and rejected"] += sum((i, not desirable) in found for i, desirable in found) // 2
    return list(found)


def _unlabelled(completion: Completion) -> str:
    kind = "completions without feedback" if completion.score is None else "scored completions without a label"
    return f"{kind} left out"


def pairs(records: Sequence[Feedback]) -> View[Pair]:
    """Preferences where there are any; otherwise desirable with undesirable completions of the same prompt, in order
    and each once; otherwise the best-scored completion of a record with its worst."""
    found: list[tuple[Feedback, str, str]] = []
    report: Counter[str] = Counter()
    waiting: dict[tuple[str, bool], deque[tuple[Feedback, str]]] = defaultdict(deque)
    for record in records:
        texts = [completion.text for completion in record.completions]
        found += [(record, texts[better], texts[worse]) for better, worse in record.preferences]
        found += _pairs_from_labels(record, waiting, report)
        found += _pairs_from_scores(record, report)
    for (_, desirable), rest in waiting.items():
        report[f"unpaired {'desirable' if desirable else 'undesirable'} completions left out"] += len(rest)
    if not found:
        raise ValueError(
            "no prompt has both a desirable and an undesirable completion: the loss needs pairs, or labels or scores "
            f"that tell a prompt's completions apart; loss=kto learns from labels alone{_left_out(report)}"
        )
    number: Counter[str] = Counter()
    examples = []
    for record, chosen, rejected in found:
        examples.append(Pair(f"{record.id}#{number[record.id]}", record.prompt, chosen, rejected))
        number[record.id] += 1
    return View(examples, +report)


def _pairs_from_labels(
    record: Feedback, waiting: dict[tuple[str, bool], deque[tuple[Feedback, str]]], report: Counter[str]
) -> list[tuple[Feedback, str, str]]:
    """Pair each labelled completion with the first one of its prompt that waits for it, or let it wait."""
    found = []
    key = prompt_key(record.prompt)
    for completion in _without_pair(record).values():
        if completion.desirable is None:
            continue
        if waiting[key, not completion.desirable]:
            other, text = waiting[key, not completion.desirable].popleft()
            mine, theirs = (record, completion.text), (other, text)
            (owner, chosen), (_, rejected) = (mine, theirs) if completion.desirable else (theirs, mine)
            found.append((owner, chosen, rejected))
        else:
            waiting[key, completion.desirable].append((record, completion.text))
    report["pairs from labels"] += len(found)
    return found


def _pairs_from_scores(record: Feedback, report: Counter[str]) -> list[tuple[Feedback, str, str]]:
    scored = _by_score(record)
    unjudged = [c for c in _without_pair(record).values() if c.desirable is None and c.score is None]
    report["completions without feedback left out"] += len(unjudged)
    if len(scored) < 2:
        report["scored completions with nothing to compare left out"] += len(scored)
        return []
    worst, best = (record.completions[i] for i in (scored[0], scored[-1]))
    if best.score == worst.score:
        report["completions with tied scores left out"] += len(scored)
        return []
    report["pairs from scores"] += 1
    report["completions with middle scores left out"] += len(scored) - 2
    return [(record, best.text, worst.text)]


def _without_pair(record: Feedback) -> dict[int, Completion]:
    paired = set(chain(*record.preferences))
    return {i: completion for i, completion in enumerate(record.completions) if i not in paired}


def _by_score(record: Feedback) -> list[int]:
    """The completions of which only a score is known, worst first; of equals the first given is the best."""
    scores = {i: c.score for i, c in _without_pair(record).items() if c.desirable is None and c.score is not None}
    return sorted(scores, key=lambda i: (scores[i], -i))


def scored(records: Sequence[Feedback]) -> View[Scored]:
    """Scores where there are any; otherwise +1 and −1 from labels, then from pairs."""
    examples: list[Scored] = []
    report: Counter[str] = Counter()
    for record in records:
        values = [(i, c.score) for i, c in enumerate(record.completions) if c.score is not None]
        have = {i for i, _ in values}
        for i, desirable in _labels(record, report):
            if i not in have:
                values.append((i, 1.0 if desirable else -1.0))
                known = record.completions[i].desirable is not None
                report["scores from labels" if known else "scores from pairs"] += 1
        report["completions without feedback left out"] += len(record.completions) - len({i for i, _ in values})
        for n, (i, score) in enumerate(values):
            examples.append(Scored(f"{record.id}#{n}", record.prompt, record.completions[i].text, score))
    if not examples:
        raise ValueError(f"no completion has a score or a label, or stands in a pair: no reward{_left_out(report)}")
    return View(examples, +report)


def _left_out(report: Counter[str]) -> str:
    counts = ", ".join(f"{count} {what}" for what, count in report.items() if count and what.endswith("left out"))
    return f" ({counts})" if counts else ""


VIEWS: dict[str, Callable[[Sequence[Feedback]], View[Any]]] = {
    "demonstrations": demonstrations,
    "binary": binary,
    "pairs": pairs,
    "scored": scored,
}
