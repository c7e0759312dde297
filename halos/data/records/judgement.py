"""The judgements of one record: its labels, scores and preferences, without any text.

Views are derived from judgements alone. Preparing a large data set therefore reads no text twice, and records with
equal judgements are processed together, once.
"""

from __future__ import annotations

from dataclasses import dataclass

from halos.data.records.record import Record


@dataclass(frozen=True, slots=True)
class Judged:
    """The label and the score of one completion.

    Attributes:
        place: index of the completion in its record.
        desirable: the label, None where there is none.
        score: the score, None where there is none.
        steps: the label of each step, None where there is none; empty for a completion without labels of steps.
    """

    place: int
    desirable: bool | None = None
    score: float | None = None
    steps: tuple[bool | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """The judged completions of one record.

    Attributes:
        completions: one entry for each completion; a selection may have left some out.
        preferences: (better, worse) pairs of indices into ``completions``.
    """

    completions: tuple[Judged, ...]
    preferences: tuple[tuple[int, int], ...] = ()


def judgement_of(record: Record) -> Judgement:
    """Return the labels, scores and preferences of a record."""
    judged = (
        Judged(place, c.desirable, c.score, tuple([step.desirable for step in c.steps]))
        for place, c in enumerate(record.completions)
    )
    return Judgement(tuple(judged), record.preferences)
