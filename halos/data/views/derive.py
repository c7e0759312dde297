"""Views of feedback records: demonstrations, labelled completions, pairs and scored completions.

A loss takes one view. Conversions are explicit: a view's ``report`` counts what was converted and what was left out.
The examples of a view are places of completions; texts are read when an example is requested.

The rules are in :mod:`halos.data.views.rules`. A data set that is known whole (:data:`VIEWS`) and a run of a stream
(:func:`of_run`) share them and :func:`_in_order`.
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
"""An example: its completion (of a pair the chosen one), the rejected one of a pair, and its label or score."""
Derived = tuple[list[LocalExample], Counter[str]]
"""The examples of one record, as places in it, and what was counted."""
Prepare = Callable[[int, Judgement], tuple[Judgement, Counter[str]]]
"""Changes the judgement of a record, given its index, before the rule of the view; also returns what it counted."""

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
    Labelled: "no completion has a label or stands in a pair: nothing to learn from",
    Pair: "no prompt has both a desirable and an undesirable completion: the loss needs pairs, or labels or scores "
    "that tell a prompt's completions apart; loss=kto learns from labels alone",
    Scored: "no completion has a score or a label, or stands in a pair: no reward",
}
"""The error for each view without an example."""
UNUSED_STEPS = "completions whose labels of steps are not used (loss.step_labels)"
NO_THRESHOLD = (
    "no completion has a label or stands in a pair: the loss needs desirable and undesirable completions; "
    "scores are not labels, they need a threshold: data.select.labels_from_scores=median, prompt or a number"
)


def _view(kind: type[E], rule: Rule, records: Sequence[Record], prepare: Prepare | None = None) -> View[E]:
    table = table_of(records)
    # Arrays, as lists of tuples would take some 200 bytes for each of perhaps millions of examples.
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
        # Counted by the binary view alone.
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
        The same examples and counts as :data:`VIEWS` gives for these records. No example is no error.
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
    # A prompt's labelled completions may be spread over records, so pairs are the one view that looks beyond a record.
    placed = _placed(derived, report)
    for chosen, rejected, value in _across_records(prompts, placed, report) if kind is Pair else placed:
        owner = chosen[0]
        yield chosen, rejected, value, numbers[owner]
        numbers[owner] += 1


def _placed(derived: Iterable[Derived], report: Counter[str]) -> Iterator[PlacedExample]:
    for index, (local, counts) in enumerate(derived):
        # Not update, which takes twice as long for so few counts: there may be millions of records.
        for reason, count in counts.items():
            report[reason] += count
        for i, j, value in local:
            yield (index, i), None if j is None else (index, j), value


def _across_records(
    prompts: Sequence[int] | np.ndarray, examples: Iterable[PlacedExample], report: Counter[str]
) -> Iterator[PlacedExample]:
    """Pair each labelled completion with the first opposite one of its prompt that is still without a partner.

    See :func:`_in_order` for the arguments.
    """
    # At most one of a prompt's two queues has entries: a completion waits only if nothing opposite waits already.
    waiting: dict[tuple[int, bool], deque[Place]] = defaultdict(deque)
    for chosen, rejected, desirable in examples:
        # A pair already, as paired completions have no label here.
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
    """Yield the examples of each record and what was counted."""
    digests = table.numbers("judged")
    cached: dict[int, Derived] = {}
    for index in range(len(table)):
        digest = int(digests[index])
        local = cached.get(digest)
        if local is None:
            local = _local(index, table.judgement(index), prepare, rule)
            # What prepare returns may depend on the record, not on its judgement alone.
            if prepare is None and len(cached) < CACHED_JUDGEMENTS:
                cached[digest] = local
        yield local


def _local(index: int, judgement: Judgement, prepare: Prepare | None, rule: Rule) -> Derived:
    """Apply a rule to a record; the completions it returns are those of the record, whatever ``prepare`` left out."""
    report = Counter[str]()
    if prepare is not None:
        judgement, report = prepare(index, judgement)
    local = rule(judgement, report)
    if rule is not stepped:
        report[UNUSED_STEPS] += sum(bool(completion.steps) for completion in judgement.completions)
    # Positions in the judgement become places in the record.
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
"""The table form of each view: from records, and how their judgements are prepared, to the view.

Each raises ``ValueError`` if no record has an example of it.
"""
demonstrations = partial(_view, Demonstration, demonstrated)
"""Derive the preferred, desirable, best-scored and unjudged completions."""
binary = partial(_view, Labelled, labelled)
"""Derive labelled completions: by their own labels, else a pair gives a desirable and an undesirable one."""
steps = partial(_view, Labelled, stepped)
"""Derive labelled completions, and the labelled steps of completions. It is a form of the binary view."""
pairs = partial(_view, Pair, paired)
"""Derive pairs: preferences; desirable with undesirable completions of a prompt; best-scored with worst-scored.

Labelled completions of a prompt are paired in their order, each once. Scores make one pair a record.
"""
scored = partial(_view, Scored, scored_rule)
"""Derive scored completions: by their own scores, else +1 and −1 from labels, else from pairs."""
