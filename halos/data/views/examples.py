"""Examples of the views: what a loss takes, made from records when it is requested."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import numpy as np

from halos.data.records.record import Prompt, Record, Reply
from halos.data.records.table import RecordTable
from halos.data.store.table import Stored
from halos.data.views.rules import StepLabel


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A completion to imitate."""

    id: str
    prompt: Prompt
    completion: Reply
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Labelled:
    """A completion, or a step of it, that is desirable or undesirable.

    Attributes:
        weight: of its record; of a step, divided by the number of the completion's labelled steps.
        step: (start, stop) of the step in the completion's text, what is after it being no part of the example; None:
            the whole completion.
    """

    id: str
    prompt: Prompt
    completion: Reply
    desirable: bool
    weight: float = 1.0
    step: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt, the first preferred to the second.

    Attributes:
        weight: of its record; of a pair from two records, the smaller of their weights.
        margin: of the preference that it is from, if that has one.
        score_chosen, score_rejected: the scores of its completions, if they have any.
    """

    id: str
    prompt: Prompt
    chosen: Reply
    rejected: Reply
    weight: float = 1.0
    margin: float | None = None
    score_chosen: float | None = None
    score_rejected: float | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """A completion with its score."""

    id: str
    prompt: Prompt
    completion: Reply
    score: float
    weight: float = 1.0


Side = tuple[Record, int]
"""A completion: its record, and its index there."""
Example = Demonstration | Labelled | Pair | Scored
E = TypeVar("E", bound=Example)
E_co = TypeVar("E_co", bound=Example, covariant=True)


@dataclass(eq=False, repr=False)
class Examples(Stored[E_co], Generic[E_co]):
    """The examples of a view; each is made from its record when it is requested.

    Attributes:
        kind: the class of the examples.
        records: the records that they come from.
        chosen: [n, 2] places of their completions, of pairs the chosen ones.
        rejected: [n, 2] places of the rejected completions of pairs; None for other views.
        values: [n] labels or scores, NaN where the view has none.
        number: [n] the number of the example among those of its record.
        steps: [n, 2] the number of each example's step, −1 for a whole completion, and how many of its completion's
            steps have a label; None for examples of whole completions alone.
    """

    kind: type[E_co]
    records: RecordTable
    chosen: np.ndarray
    rejected: np.ndarray | None
    values: np.ndarray
    number: np.ndarray
    steps: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, indices: np.ndarray) -> Examples[E_co]:
        """Return the examples with these indices, in their order."""
        rejected, steps = (None if column is None else column[indices] for column in (self.rejected, self.steps))
        columns = self.chosen[indices], rejected, self.values[indices], self.number[indices], steps
        return Examples(self.kind, self.records, *columns)

    def within(self, records: RecordTable, places: np.ndarray) -> Examples[E_co]:
        """Return the same examples with their records at other places, [records], of another table."""

        def moved(completions: np.ndarray) -> np.ndarray:
            return np.column_stack([places[completions[:, 0]], completions[:, 1]]).astype(np.int32)

        rejected = None if self.rejected is None else moved(self.rejected)
        return Examples(self.kind, records, moved(self.chosen), rejected, self.values, self.number, self.steps)

    @property
    def key(self) -> str | None:
        """A key of the examples and their order; None where the records are in memory."""
        if self.records.key is None:
            return None
        hasher = hashlib.sha256(f"{self.records.key} {self.kind.__name__}".encode())
        for numbers in (self.chosen, self.rejected, self.values, self.number, self.steps):
            hasher.update(b"" if numbers is None else np.ascontiguousarray(numbers).tobytes())
        return hasher.hexdigest()[:24]

    @property
    def views(self) -> tuple[Examples[E_co], ...]:
        """These examples, which are of one view."""
        return (self,)

    @property
    def labels(self) -> np.ndarray | None:
        """[n] whether each example is desirable; None for views without labels."""
        return self.values == 1 if self.kind is Labelled else None

    @property
    def weights(self) -> np.ndarray:
        """[n] the weight of each example."""
        weights = self.records.numbers("weight")
        example_weights = weights[self.chosen[:, 0]]
        if self.rejected is not None:
            example_weights = np.minimum(example_weights, weights[self.rejected[:, 0]])
        return np.asarray(example_weights if self.steps is None else example_weights / np.maximum(self.steps[:, 1], 1))

    @property
    def prompts(self) -> np.ndarray:
        """[n] a number for the prompt of each example, equal for equal prompts."""
        return np.asarray(self.records.numbers("prompt")[self.chosen[:, 0]])

    @property
    def names(self) -> np.ndarray:
        """[n] the digest of the id of each example's record."""
        return np.asarray(self.records.numbers("name")[self.chosen[:, 0]])

    def many(self, indices: np.ndarray) -> list[E_co]:
        owners = self.records.many(self.chosen[indices, 0])
        others = None
        if self.rejected is not None:
            # The two completions of a pair may belong to different records of the same prompt.
            is_same = np.array_equal(self.chosen[indices, 0], self.rejected[indices, 0])
            others = owners if is_same else self.records.many(self.rejected[indices, 0])
        examples: list[Example] = []
        for n, (index, record) in enumerate(zip(indices.tolist(), owners, strict=True)):
            value: Side | StepLabel | float = float(self.values[index])
            if self.steps is not None and self.steps[index, 0] >= 0:
                value = StepLabel(int(self.steps[index, 0]), int(self.steps[index, 1]), bool(value))
            if others is not None and self.rejected is not None:
                value = others[n], int(self.rejected[index, 1])
            examples.append(make_example(self.kind, record, int(self.chosen[index, 1]), int(self.number[index]), value))
        return cast(list[E_co], examples)


def make_example(
    kind: type[object], record: Record, place: int, number: int, value: Side | StepLabel | float
) -> Example:
    """Make the example of a record's completion; ``value``: the rejected completion, the label or the score."""
    name, reply = f"{record.id}#{number}", record.completions[place].reply
    if isinstance(value, StepLabel):
        steps = record.completions[place].steps
        span = steps[value.number - 1].stop if value.number else 0, steps[value.number].stop
        return Labelled(name, record.prompt, reply, value.desirable, record.weight / value.labelled, span)
    if isinstance(value, tuple):
        return _pair(name, (record, place), value)
    if kind is Labelled:
        return Labelled(name, record.prompt, reply, bool(value), record.weight)
    if kind is Scored:
        return Scored(name, record.prompt, reply, float(value), record.weight)
    return Demonstration(name, record.prompt, reply, record.weight)


def _pair(name: str, chosen: Side, rejected: Side) -> Pair:
    (record, better), (other, worse) = chosen, rejected
    one, two = record.completions[better], other.completions[worse]
    # The margin is that of a preference: labels and scores pair other completions of the record too.
    preferred = record == other and (better, worse) in record.preferences
    return Pair(
        name,
        record.prompt,
        one.reply,
        two.reply,
        weight=min(record.weight, other.weight),
        margin=record.margin if preferred else None,
        score_chosen=one.score,
        score_rejected=two.score,
    )
