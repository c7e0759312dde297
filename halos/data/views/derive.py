"""Views of feedback records: demonstrations, labelled completions, pairs and scored completions.

A loss takes one view. Conversions are explicit: a view's ``report`` counts what was converted and what was left out.
The examples of a view hold only the places of completions; texts are read when an example is requested.

:mod:`halos.data.views.rules` has the rules: which examples a record has. Two functions apply them, to a whole data set
(:data:`VIEWS`) and to consecutive records of a stream that have one prompt (:func:`of_run`).
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Generic, NamedTuple

import numpy as np

from halos.data.records.judgement import Judgement, judgement_of
from halos.data.records.record import Record
from halos.data.records.table import RecordTable, table_of
from halos.data.views.examples import Demonstration, E, E_co, Example, Examples, Labelled, Pair, Scored, make_example
from halos.data.views.rules import (
    LocalExample,
    Rule,
    StepLabel,
    Value,
    demonstrated,
    labelled,
    paired,
    scored as scored_rule,
    stepped,
)

Place = tuple[int, int]
"""The index of a record, and the index of a completion in it."""
PlacedExample = tuple[Place, Place | None, Value]
"""An example: its completion (for a pair, the chosen one), the rejected one of a pair, and the label or score."""
Derived = tuple[list[LocalExample], Counter[str]]
"""The examples of one record, as places in it, and counts of what was converted or left out."""
Prepare = Callable[[int, Judgement], tuple[Judgement, Counter[str]]]
"""Takes the index and the judgement of a record. Returns the judgement that the view's rule reads, and counts."""

CACHED_JUDGEMENTS = 1 << 12
"""Distinct judgements whose examples are cached: most data sets have only a few."""


class View(NamedTuple, Generic[E_co]):
    """Examples in the order of their records, and counts of what was converted or left out.

    The id of an example is the id of its record, ``#``, and the number of the example in that record.
    """

    examples: Examples[E_co]
    report: Counter[str]


NOTHING: dict[type[object], str] = {
    Demonstration: "no completion is preferred, desirable or unjudged: nothing to imitate",
    Labelled: "no completion has a label or is in a pair: nothing to learn from",
    Pair: "no prompt has both a desirable and an undesirable completion: the loss needs pairs, or labels or scores "
    "that tell a prompt's completions apart; loss=kto learns from labels alone",
    Scored: "no completion has a score or a label, or is in a pair: no reward",
}
"""The error for each view without an example."""
UNUSED_STEPS = "completions whose labels of steps are not used (loss.step_labels)"
NO_THRESHOLD = (
    "no completion has a label or is in a pair: the loss needs desirable and undesirable completions; "
    "to make labels from scores, set a threshold: data.select.labels_from_scores=median, prompt or a number"
)


def _view(kind: type[E], rule: Rule, records: Sequence[Record], prepare: Prepare | None = None) -> View[E]:
    table = table_of(records)
    # Arrays: lists of tuples would take some 200 bytes for each example, of which there may be millions.
    chosen, rejected, values, number, steps = array("i"), array("i"), array("d"), array("i"), array("i")
    report: Counter[str] = Counter()
    derived = _of_table(table, prepare, rule)
    for one, other, value, count in _in_order(kind, table.numbers("prompt"), derived, report):
        chosen.extend(one)
        rejected.extend(other or ())
        label = value.desirable if isinstance(value, StepLabel) else value
        values.append(float("nan") if label is None else label)
        steps.extend(value[:2] if isinstance(value, StepLabel) else (-1, 0))
        number.append(count)
    if not chosen:
        # Only the binary view has this count.
        if report["scored completions without a label left out"]:
            raise ValueError(NO_THRESHOLD)
        left_out = ", ".join(f"{count} {what}" for what, count in report.items() if count and what.endswith("left out"))
        raise ValueError(NOTHING[kind] + (f" ({left_out})" if left_out else ""))
    places, numbers = np.frombuffer(chosen, np.int32).reshape(-1, 2), np.frombuffer(number, np.int32)
    others = np.frombuffer(rejected, np.int32).reshape(-1, 2) if kind is Pair else None
    of_steps = np.frombuffer(steps, np.int32).reshape(-1, 2) if rule is stepped else None
    return View(Examples(kind, table, places, others, np.frombuffer(values, np.float64), numbers, of_steps), report)


def of_run(view: str, run: Sequence[Record], prepare: Prepare | None = None) -> tuple[list[Example], Counter[str]]:
    """Derive a view from a few records of a stream that have one prompt.

    Args:
        view: a name in :data:`VIEWS`.
        run: the records; labelled completions of different ones are paired.
        prepare: changes their judgements first.

    Returns:
        The same examples and counts as :data:`VIEWS` gives for these records. To have no example is not an error here.
    """
    kind, rule = RULES[view]
    report: Counter[str] = Counter()
    derived = (_local(n, judgement_of(record), prepare, rule) for n, record in enumerate(run))
    examples = []
    for (owner, place), other, value, number in _in_order(kind, [0] * len(run), derived, report):
        # The value of a demonstration is None and not read.
        rejected_or_value = (value or 0.0) if other is None else (run[other[0]], other[1])
        examples.append(make_example(kind, run[owner], place, number, rejected_or_value))
    return examples, report


def _in_order(
    kind: type[object], prompts: Sequence[int] | np.ndarray, derived: Iterable[Derived], report: Counter[str]
) -> Iterator[tuple[Place, Place | None, Value, int]]:
    """Yield the examples of all records in their order, each with its number in its record.

    Args:
        kind: the class of the examples.
        prompts: for each record a number that is equal for equal prompts.
        derived: the examples of each record.
        report: receives the counts.
    """
    # A plain array: reading one number of a numpy array takes several times as long.
    numbers = array("i", bytes(4 * len(prompts)))
    # Only pairs look beyond one record, because the labelled completions of a prompt may be in several records.
    placed = _placed(derived, report)
    for chosen, rejected, value in _across_records(prompts, placed, report) if kind is Pair else placed:
        owner = chosen[0]
        yield chosen, rejected, value, numbers[owner]
        numbers[owner] += 1


def _placed(derived: Iterable[Derived], report: Counter[str]) -> Iterator[PlacedExample]:
    for index, (local, counts) in enumerate(derived):
        # A loop instead of update(), which takes twice as long for so few counts: there may be millions of records.
        for reason, count in counts.items():
            report[reason] += count
        for i, j, value in local:
            yield (index, i), None if j is None else (index, j), value


def _across_records(
    prompts: Sequence[int] | np.ndarray, examples: Iterable[PlacedExample], report: Counter[str]
) -> Iterator[PlacedExample]:
    """Pair each labelled completion with the first completion of its prompt that has the opposite label and no partner.

    See :func:`_in_order` for the arguments.
    """
    # At most one of a prompt's two queues has entries: a completion waits only if nothing opposite waits already.
    waiting: dict[tuple[int, bool], deque[Place]] = defaultdict(deque)
    for chosen, rejected, desirable in examples:
        # No label: the example is a pair already.
        if desirable is None:
            yield chosen, rejected, None
            continue
        prompt = int(prompts[chosen[0]])
        if opposite := waiting.get((prompt, not desirable)):
            partner = opposite.popleft()
            report["pairs from labels"] += 1
            yield (chosen, partner, None) if desirable else (partner, chosen, None)
        else:
            waiting[prompt, bool(desirable)].append(chosen)
    for (_, desirable), places in waiting.items():
        if places:
            report[f"unpaired {'desirable' if desirable else 'undesirable'} completions left out"] += len(places)


def _of_table(table: RecordTable, prepare: Prepare | None, rule: Rule) -> Iterator[Derived]:
    """Yield the examples of each record and its counts. Records with equal judgements share one result."""
    digests = table.numbers("judged")
    cached: dict[int, Derived] = {}
    for index in range(len(table)):
        digest = int(digests[index])
        local = cached.get(digest)
        if local is None:
            local = _local(index, table.judgement(index), prepare, rule)
            # Not with ``prepare``, whose result may depend on more than the judgement.
            if prepare is None and len(cached) < CACHED_JUDGEMENTS:
                cached[digest] = local
        yield local


def _local(index: int, judgement: Judgement, prepare: Prepare | None, rule: Rule) -> Derived:
    """Apply a rule to a record. Completions are numbered as in the record, even if ``prepare`` has left some out."""
    report = Counter[str]()
    if prepare is not None:
        judgement, report = prepare(index, judgement)
    local = rule(judgement, report)
    if rule is not stepped:
        report[UNUSED_STEPS] += sum(bool(completion.steps) for completion in judgement.completions)
    # From positions in the prepared judgement to places in the record.
    at = [completion.place for completion in judgement.completions]
    return [(at[i], None if j is None else at[j], value) for i, j, value in local], +report


RULES: dict[str, tuple[type[Example], Rule]] = {
    "demonstrations": (Demonstration, demonstrated),
    "binary": (Labelled, labelled),
    "steps": (Labelled, stepped),
    "pairs": (Pair, paired),
    "scored": (Scored, scored_rule),
}
VIEWS: dict[str, Callable[..., View[Example]]] = {name: partial(_view, *rule) for name, rule in RULES.items()}
"""The functions that derive a view from records: they take the records and, as ``prepare``, a :data:`Prepare`.

Each raises ``ValueError`` if no record has an example.
"""
demonstrations = partial(_view, Demonstration, demonstrated)
"""Derive the preferred, desirable, best-scored and unjudged completions."""
binary = partial(_view, Labelled, labelled)
"""Derive labelled completions: by their own labels, else the preferred one of a pair is desirable, the other not."""
steps = partial(_view, Labelled, stepped)
"""Derive labelled completions, and the labelled steps of completions: the binary view with steps."""
pairs = partial(_view, Pair, paired)
"""Derive pairs: preferences; desirable with undesirable completions of a prompt; best-scored with worst-scored.

Labelled completions of a prompt are paired in their order, each once. Scores give one pair for each record.
"""
scored = partial(_view, Scored, scored_rule)
"""Derive scored completions. A completion has its own score, or else +1 or −1 from its label or its pair."""
