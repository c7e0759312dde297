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

    A pair may be of two records of a prompt, which then count as one: their examples stay together.

    Attributes:
        views: the examples of each view.
    """

    views: tuple[Examples[Example], ...]

    @cached_property
    def owners(self) -> tuple[np.ndarray, ...]:
        """For each view the number of each example's record, [n]; of records that count as one, the first's."""
        first = np.arange(len(self.views[0].records))
        linked = [(view.chosen[:, 0], view.rejected[:, 0]) for view in self.views if view.rejected is not None]
        while any((first[one] != first[other]).any() for one, other in linked):
            for one, other in linked:
                lower = np.minimum(first[one], first[other])
                np.minimum.at(first, one, lower)
                np.minimum.at(first, other, lower)
        return tuple(first[view.chosen[:, 0]] for view in self.views)

    @cached_property
    def numbers(self) -> np.ndarray:
        """[n] the numbers of the records in their table, ascending."""
        return np.unique(np.concatenate(self.owners))

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, indices: np.ndarray) -> JointExamples:
        """Return the records with these indices, with all of their examples."""
        places_by_view = [np.flatnonzero(np.isin(owners, self.numbers[indices])) for owners in self.owners]
        return JointExamples(tuple(view.take(places) for view, places in zip(self.views, places_by_view, strict=True)))

    @property
    def prompts(self) -> np.ndarray:
        """[n] a number for the prompt of each record, equal for equal prompts."""
        return np.asarray(self.views[0].records.numbers("prompt")[self.numbers])

    def many(self, indices: np.ndarray) -> list[Record]:
        """Return the records with these indices."""
        return self.views[0].records.many(self.numbers[indices])
