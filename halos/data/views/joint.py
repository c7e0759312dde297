"""Records with their examples in several views, for a mixture whose losses take different forms of feedback."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from halos.data.records.record import Record
from halos.data.views.examples import Example, Examples


@dataclass(eq=False, repr=False)
class JointExamples:
    """The records of one table that have an example in at least one of several views.

    Attributes:
        views: the examples of each view.
    """

    views: tuple[Examples[Example], ...]

    @cached_property
    def numbers(self) -> np.ndarray:
        """[n] the numbers of the records in their table, ascending."""
        return np.unique(np.concatenate([examples.chosen[:, 0] for examples in self.views]))

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, indices: np.ndarray) -> JointExamples:
        """Return the records with these indices, with all of their examples."""
        kept = self.numbers[indices]
        places = [np.flatnonzero(np.isin(examples.chosen[:, 0], kept)) for examples in self.views]
        return JointExamples(tuple(own.take(of_view) for own, of_view in zip(self.views, places, strict=True)))

    @property
    def prompts(self) -> np.ndarray:
        """[n] a number for the prompt of each record, equal for equal prompts."""
        return np.asarray(self.views[0].records.numbers("prompt")[self.numbers])

    def many(self, indices: np.ndarray) -> list[Record]:
        """Return the records with these indices."""
        return self.views[0].records.many(self.numbers[indices])
