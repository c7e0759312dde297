"""Examples of the views: what a loss takes, made from records when it is requested."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import numpy as np

from halos.data.records.record import Prompt, Record, Reply
from halos.data.records.table import RecordTable
from halos.data.store.arrow import Stored


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A completion to imitate."""

    id: str
    prompt: Prompt
    completion: Reply


@dataclass(frozen=True, slots=True)
class Labelled:
    """A completion that is desirable or undesirable."""

    id: str
    prompt: Prompt
    completion: Reply
    desirable: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt, the first preferred to the second."""

    id: str
    prompt: Prompt
    chosen: Reply
    rejected: Reply


@dataclass(frozen=True, slots=True)
class Scored:
    """A completion with its score."""

    id: str
    prompt: Prompt
    completion: Reply
    score: float


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
    """

    kind: type[E_co]
    records: RecordTable
    chosen: np.ndarray
    rejected: np.ndarray | None
    values: np.ndarray
    number: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, indices: np.ndarray) -> Examples[E_co]:
        """Return the examples with these indices, in their order."""
        rejected, chosen = None if self.rejected is None else self.rejected[indices], self.chosen[indices]
        return Examples(self.kind, self.records, chosen, rejected, self.values[indices], self.number[indices])

    @property
    def key(self) -> str | None:
        """A key of the examples and their order; None where the records are in memory."""
        if self.records.key is None:
            return None
        hasher = hashlib.sha256(f"{self.records.key} {self.kind.__name__}".encode())
        for numbers in (self.chosen, self.rejected, self.values, self.number):
            hasher.update(b"" if numbers is None else np.ascontiguousarray(numbers).tobytes())
        return hasher.hexdigest()[:24]

    @property
    def labels(self) -> np.ndarray | None:
        """[n] whether each example is desirable; None for views without labels."""
        return self.values == 1 if self.kind is Labelled else None

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
        # The two completions of a pair may belong to different records of the same prompt.
        others = None if self.rejected is None else self.records.many(self.rejected[indices, 0])
        examples: list[Example] = []
        for n, (index, record) in enumerate(zip(indices.tolist(), owners, strict=True)):
            value: Reply | float = float(self.values[index])
            if others is not None and self.rejected is not None:
                value = others[n].completions[self.rejected[index, 1]].reply
            examples.append(make_example(self.kind, record, int(self.chosen[index, 1]), int(self.number[index]), value))
        return cast(list[E_co], examples)


def make_example(kind: type[object], record: Record, place: int, number: int, value: Reply | float) -> Example:
    """Make the example of a record's completion; ``value``: the rejected reply, the label or the score."""
    name, reply = f"{record.id}#{number}", record.completions[place].reply
    if isinstance(value, str | tuple):
        return Pair(name, record.prompt, reply, value)
    if kind is Labelled:
        return Labelled(name, record.prompt, reply, bool(value))
    if kind is Scored:
        return Scored(name, record.prompt, reply, float(value))
    return Demonstration(name, record.prompt, reply)
