"""What an objective eats, derived from feedback records: demonstrations, labelled completions, pairs, scores.

Conversions are explicit: a view's ``report`` counts what was converted and what was left out. A view is made of what is
said of the completions; their texts are read when an example is asked for.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy as np

from halos.data.records.record import Prompt, Record
from halos.data.records.table import Judged, Judgement, RecordTable, judgement_of, table_of
from halos.data.store.arrow import Stored


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

Place = tuple[int, int]
"""A record's number, and that of a completion in it."""
Value = bool | float | None
"""What an example knows beside its texts: a label or a score."""
Found = tuple[Place, Place | None, Value]
"""An example: its completion (of a pair the chosen one), of a pair the rejected one, and what it knows."""
Prepare = Callable[[int, Judgement], tuple[Judgement, Counter[str]]]
"""What a record's number and what is said of it become before the view, and what that did."""

REMEMBERED = 1 << 12
"""Kinds of judgement of which a view remembers what became of them: most data have few."""


class Examples(Stored[E]):
    """Examples of a view, made of their records when they are asked for.

    ``records``: where they come from. ``chosen`` [n, 2] and for pairs ``rejected`` [n, 2]: places of their completions;
    ``values`` [n]: labels or scores, NaN where the view has none; ``number`` [n]: of the example in its record.
    """

    def __init__(
        self,
        kind: type[Any],
        records: RecordTable,
        chosen: np.ndarray,
        rejected: np.ndarray | None,
        values: np.ndarray,
        number: np.ndarray,
    ) -> None:
        self.kind, self.records = kind, records
        self.chosen, self.rejected, self.values, self.number = chosen, rejected, values, number

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, indices: np.ndarray) -> Examples[E]:
        """Those of these examples."""
        rejected = None if self.rejected is None else self.rejected[indices]
        return Examples(
            self.kind, self.records, self.chosen[indices], rejected, self.values[indices], self.number[indices]
        )

    @property
    def key(self) -> str | None:
        """A key of the examples and their order; None where the records are in memory."""
        if self.records.key is None:
            return None
        found = hashlib.sha256(f"{self.records.key} {self.kind.__name__}".encode())
        for numbers in (self.chosen, self.rejected, self.values, self.number):
            found.update(b"" if numbers is None else np.ascontiguousarray(numbers).tobytes())
        return found.hexdigest()[:24]

    @property
    def labels(self) -> np.ndarray | None:
        """Whether each is desirable, where the view says so."""
        return self.values == 1 if self.kind is Labelled else None

    @property
    def prompts(self) -> np.ndarray:
        """A number for each example that is the same for the same prompt."""
        return self.records.numbers("prompt")[self.chosen[:, 0]]

    def many(self, indices: np.ndarray) -> list[E]:
        owners = self.records.many(self.chosen[indices, 0])
        others = None if self.rejected is None else self.records.many(self.rejected[indices, 0])
        made: list[Any] = []
        for n, (index, record) in enumerate(zip(indices.tolist(), owners, strict=True)):
            known: Any = self.values[index]
            if others is not None and self.rejected is not None:
                known = others[n].completions[self.rejected[index, 1]].text
            made.append(_example(self.kind, record, int(self.chosen[index, 1]), int(self.number[index]), known))
        return made


def _example(kind: type[Any], record: Record, place: int, number: int, known: Any) -> Any:
    """The example of a record's completion; ``known``: the rejected text, the label or the score."""
    start = (f"{record.id}#{number}", record.prompt, record.completions[place].text)
    if kind is Demonstration:
        return kind(*start)
    return kind(*start, known if kind is Pair else bool(known) if kind is Labelled else float(known))


@dataclass(frozen=True, slots=True)
class View(Generic[E]):
    """Examples in the order of their records, and how often something was converted or left out.

    An example's id is its record's with ``#`` and the number of the example in that record.
    """

    examples: Examples[E]
    report: Counter[str]


def demonstrations(records: Sequence[Record], prepare: Prepare | None = None) -> View[Demonstration]:
    """Preferred, desirable, best-scored and unjudged completions."""
    view = _view(Demonstration, records, _each(records, prepare, demonstrated))
    if not view.examples:
        raise ValueError(
            f"no completion is preferred, desirable or unjudged: nothing to imitate{_left_out(view.report)}"
        )
    return view


def demonstrated(record: Judgement, report: Counter[str]) -> list[Local]:
    """The completions of one record to imitate."""
    reasons = [_why_no_demonstration(record, i) for i in range(len(record.completions))]
    report.update(reason for reason in reasons if reason is not None)
    return [(i, None, None) for i, reason in enumerate(reasons) if reason is None]


def _why_no_demonstration(record: Judgement, i: int) -> str | None:
    """The reason to leave completion ``i`` out, None if it is one to imitate."""
    completion = record.completions[i]
    if completion.desirable is not None:
        return None if completion.desirable else "undesirable completions left out"
    if any(i == better for better, _ in record.preferences):
        return None
    if any(i == worse for _, worse in record.preferences):
        return "rejected completions left out"
    return None if completion.score is None or i == _by_score(record)[-1] else "lower-scored completions left out"


def binary(records: Sequence[Record], prepare: Prepare | None = None) -> View[Labelled]:
    """Labels where there are any; otherwise a pair gives a desirable and an undesirable completion."""
    view = _view(Labelled, records, _each(records, prepare, _labelled))
    if not view.examples:
        raise ValueError(
            "no completion has a label or stands in a pair: the loss needs desirable and undesirable completions; "
            "scores are not labels, they need a threshold: data.select.labels_from_scores=median, prompt or a number"
            if view.report["scored completions without a label left out"]
            else f"no completion has a label or stands in a pair: nothing to learn from{_left_out(view.report)}"
        )
    return view


def _labelled(record: Judgement, report: Counter[str]) -> list[Local]:
    labels = _labels(record, report)
    report["labelled completions from pairs"] += sum(record.completions[i].desirable is None for i, _ in labels)
    for i in sorted(set(range(len(record.completions))) - {i for i, _ in labels}):
        report[_unlabelled(record.completions[i])] += 1
    return [(i, None, desirable) for i, desirable in labels]


def _labels(record: Judgement, report: Counter[str]) -> list[tuple[int, bool]]:
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


def _unlabelled(completion: Judged) -> str:
    kind = "completions without feedback" if completion.score is None else "scored completions without a label"
    return f"{kind} left out"


def pairs(records: Sequence[Record], prepare: Prepare | None = None) -> View[Pair]:
    """Preferences where there are any; otherwise desirable with undesirable completions of the same prompt, in order
    and each once; otherwise the best-scored completion of a record with its worst."""
    table = table_of(records)
    report: Counter[str] = Counter()
    view = _view(Pair, table, _across(table.numbers("prompt"), _each(table, prepare, _paired), report))
    view.report.update(report)
    if not view.examples:
        raise ValueError(
            "no prompt has both a desirable and an undesirable completion: the loss needs pairs, or labels or scores "
            f"that tell a prompt's completions apart; loss=kto learns from labels alone{_left_out(view.report)}"
        )
    return view


def _paired(record: Judgement, report: Counter[str]) -> list[Local]:
    """Pairs, and by themselves the completions with a label that wait for another of their prompt."""
    found: list[Local] = [(better, worse, None) for better, worse in record.preferences]
    found += [(i, None, c.desirable) for i, c in _without_pair(record).items() if c.desirable is not None]
    return found + _pairs_from_scores(record, report)


def _across(
    prompts: Sequence[int] | np.ndarray, found: Iterable[tuple[list[Found], Counter[str]]], report: Counter[str]
) -> Iterator[tuple[list[Found], Counter[str]]]:
    """Pair each labelled completion with the first one of its prompt that waits for it, or let it wait; ``prompts``:
    a number for that of each record."""
    waiting: dict[tuple[int, bool], deque[Place]] = defaultdict(deque)
    for examples, counts in found:
        made: list[Found] = []
        for chosen, rejected, desirable in examples:
            if desirable is None:
                made.append((chosen, rejected, None))
                continue
            key = int(prompts[chosen[0]])
            if other := waiting.get((key, not desirable)):
                mates = (chosen, other.popleft())
                made.append((*(mates if desirable else mates[::-1]), None))
                report["pairs from labels"] += 1
            else:
                waiting[key, bool(desirable)].append(chosen)
        yield made, counts
    for (_, kind), rest in waiting.items():
        if rest:
            report[f"unpaired {'desirable' if kind else 'undesirable'} completions left out"] += len(rest)


def _pairs_from_scores(record: Judgement, report: Counter[str]) -> list[Local]:
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
    return [(scored[-1], scored[0], None)]


def _without_pair(record: Judgement) -> dict[int, Judged]:
    paired = set(chain(*record.preferences))
    return {i: completion for i, completion in enumerate(record.completions) if i not in paired}


def _by_score(record: Judgement) -> list[int]:
    """The completions of which only a score is known, worst first; of equals the first given is the best."""
    scores = {i: c.score for i, c in _without_pair(record).items() if c.desirable is None and c.score is not None}
    return sorted(scores, key=lambda i: (scores[i], -i))


def scored(records: Sequence[Record], prepare: Prepare | None = None) -> View[Scored]:
    """Scores where there are any; otherwise +1 and −1 from labels, then from pairs."""
    view = _view(Scored, records, _each(records, prepare, _scored))
    if not view.examples:
        raise ValueError(
            f"no completion has a score or a label, or stands in a pair: no reward{_left_out(view.report)}"
        )
    return view


def _scored(record: Judgement, report: Counter[str]) -> list[Local]:
    values: list[tuple[int, float]] = [(i, c.score) for i, c in enumerate(record.completions) if c.score is not None]
    have = {i for i, _ in values}
    for i, desirable in _labels(record, report):
        if i not in have:
            values.append((i, 1.0 if desirable else -1.0))
            known = record.completions[i].desirable is not None
            report["scores from labels" if known else "scores from pairs"] += 1
    report["completions without feedback left out"] += len(record.completions) - len({i for i, _ in values})
    return [(i, None, score) for i, score in values]


Local = tuple[int, int | None, Value]
"""Of one record: a completion, of a pair the rejected one, and what is known, by positions in a judgement."""
Derive = Callable[[Judgement, Counter[str]], list[Local]]


def _each(
    records: Sequence[Record], prepare: Prepare | None, derive: Derive
) -> Iterator[tuple[list[Found], Counter[str]]]:
    """Record by record the examples of a view and what was counted; what is said of many records is looked at once."""
    table = table_of(records)
    kinds = table.numbers("judged")
    known: dict[int, tuple[list[Local], Counter[str]]] = {}
    for index in range(len(table)):
        kind = int(kinds[index])
        found = known.get(kind)
        if found is None:
            found = _local(index, table.judgement(index), prepare, derive)
            if prepare is None and len(known) < REMEMBERED:
                known[kind] = found
        yield _placed(index, *found)


def _local(
    index: int, judgement: Judgement, prepare: Prepare | None, derive: Derive
) -> tuple[list[Local], Counter[str]]:
    report = Counter[str]()
    if prepare is not None:
        judgement, report = prepare(index, judgement)
    local = derive(judgement, report)
    at = [completion.place for completion in judgement.completions]
    return [(at[i], None if j is None else at[j], value) for i, j, value in local], +report


def _placed(index: int, local: list[Local], report: Counter[str]) -> tuple[list[Found], Counter[str]]:
    return [((index, i), None if j is None else (index, j), value) for i, j, value in local], report


def of_run(view: str, run: Sequence[Record], prepare: Prepare | None = None) -> tuple[list[Any], Counter[str]]:
    """The examples of a view from a few records, the same as :data:`VIEWS` makes of them, and what was counted.

    Labelled completions of different records are paired as if all records had one prompt. No example is no error.
    """
    kind, derive = DERIVED[view]
    report: Counter[str] = Counter()
    found = (_placed(n, *_local(n, judgement_of(record), prepare, derive)) for n, record in enumerate(run))
    made: list[Any] = []
    number: Counter[int] = Counter()
    for examples, counts in _across([0] * len(run), found, report) if kind is Pair else found:
        report.update(counts)
        for (owner, place), other, value in examples:
            known = value if other is None else run[other[0]].completions[other[1]].text
            made.append(_example(kind, run[owner], place, number[owner], known))
            number[owner] += 1
    return made, report


def _view(kind: type[Any], records: Sequence[Record], found: Iterable[tuple[list[Found], Counter[str]]]) -> View[Any]:
    table = table_of(records)
    chosen, rejected, values = array("i"), array("i"), array("d")
    report: Counter[str] = Counter()
    for examples, counts in found:
        for one, other, value in examples:
            chosen.extend(one)
            rejected.extend(other or ())
            values.append(float("nan") if value is None else value)
        for reason, count in counts.items():
            report[reason] += count
    places = np.frombuffer(chosen, dtype=np.int32).reshape(-1, 2)
    others = np.frombuffer(rejected, dtype=np.int32).reshape(-1, 2) if kind is Pair else None
    known = np.frombuffer(values, dtype=np.float64)
    return View(Examples(kind, table, places, others, known, _numbered(places[:, 0])), report)


def _numbered(owners: np.ndarray) -> np.ndarray:
    """How many of the same owner came before, [n]."""
    order = np.argsort(owners, kind="stable")
    ordered = owners[order]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(owners) else np.zeros(0, dtype=bool)
    starts = np.flatnonzero(new)
    number = np.empty(len(owners), dtype=np.int32)
    number[order] = np.arange(len(owners)) - starts[np.cumsum(new) - 1]
    return number


def _left_out(report: Counter[str]) -> str:
    counts = ", ".join(f"{count} {what}" for what, count in report.items() if count and what.endswith("left out"))
    return f" ({counts})" if counts else ""


DERIVED: dict[str, tuple[type[Any], Derive]] = {
    "demonstrations": (Demonstration, demonstrated),
    "binary": (Labelled, _labelled),
    "pairs": (Pair, _paired),
    "scored": (Scored, _scored),
}
VIEWS: dict[str, Callable[..., View[Any]]] = {
    "demonstrations": demonstrations,
    "binary": binary,
    "pairs": pairs,
    "scored": scored,
}
