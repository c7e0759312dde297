"""Rows of records that are read in several views, for a mixture whose losses take different forms of feedback.

The row of a record (or of several, where a pair is of two) has all completions that the views read, each once, and
what each view makes of them. A record with a chosen reply a and a rejected reply b, whose mismatched completions (KTO's
y') are m and n:

    branches          a   b   m   n        the last two get no gradient
    pairs            (a,  b)
    binary           (a,      m) desirable
                         (b,      n) undesirable
    demonstrations   (a)

So the model computes a completion once, however many losses read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from halos.data.rows.mismatch import in_order
from halos.data.rows.token_rows import Row, Span, TokenRows, ViewRows, group_sizes
from halos.data.store.table import Stored

_Completion = tuple[tuple[int, ...], tuple[Span, ...]]


def joint_row(name: str, group: int, views: Sequence[ViewRows]) -> Row:
    """Make the row of a record from its examples in each view, of which there is at least one."""
    trained, mismatched = dict[_Completion, None](), dict[_Completion, None]()
    for view in views:
        for row in view.rows:
            for branch in range(view.branches):
                other = view.mismatched and branch == view.branches - 1
                (mismatched if other else trained)[_completion(row, branch)] = None
    branches, context = zip(*trained, *mismatched, strict=True)
    prompt = next(row.prompt for view in views for row in view.rows)
    context = context if any(context) else ()
    return Row(name, group, prompt, branches, context=context, views=tuple(views), mismatched=len(mismatched))


def places(row: Row, view: ViewRows) -> list[list[int]]:
    """For each example of a view, the places of its branches among those of the record's row."""
    completions = [_completion(row, branch) for branch in range(len(row.branches))]
    trained = len(completions) - row.mismatched
    trained_places = {completion: place for place, completion in enumerate(completions[:trained])}
    mismatched_places = {completion: place for place, completion in enumerate(completions[trained:], trained)}
    example_places = []
    for example in view.rows:
        branches = [_completion(example, branch) for branch in range(view.branches)]
        last = [mismatched_places[branches.pop()]] if view.mismatched else []
        example_places.append([trained_places[completion] for completion in branches] + last)
    return example_places


def by_view(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """The rows of each view; the rows themselves, if they are of one view."""
    views = range(len(rows[0].views))
    return [[example for row in rows for example in row.views[number].rows] for number in views] or [rows]


def sizes_by_view(rows: Sequence[Row]) -> list[np.ndarray]:
    """For each view, or for the one view of the rows, the number of rows in each group, [groups]."""
    views = rows.views if isinstance(rows, JointRows) else by_view(rows)
    return [group_sizes(view) for view in views]


def _completion(row: Row, branch: int) -> _Completion:
    return row.branches[branch], row.context[branch] if row.context else ()


class JointRows(Stored[Row]):
    """The rows of records in several views.

    Args:
        views: for each view its name, its rows and, for each of these, the number of its record, [n].

    Attributes:
        views: the rows of each view.
        labels: [records] -1, as a record may have both labels.
        groups: [records] equal numbers for equal prompts, in the order of their first records.
        conversations: [records] likewise for prompts whose conversations begin with the same user turn.
    """

    def __init__(self, views: Sequence[tuple[str, TokenRows, np.ndarray]]) -> None:
        self.names = [name for name, _, _ in views]
        self.views = [rows for _, rows, _ in views]
        records, member = np.unique(np.concatenate([owners for _, _, owners in views]), return_inverse=True)
        self._members = np.split(member, np.cumsum([len(rows) for rows in self.views])[:-1])
        self._orders = [np.argsort(members, kind="stable") for members in self._members]
        self._starts = [
            np.searchsorted(members[order], np.arange(len(records) + 1))
            for members, order in zip(self._members, self._orders, strict=True)
        ]
        self.labels = np.full(len(records), -1)
        self.groups = in_order(self._of_prompts("prompt_digest"))
        self.conversations = in_order(self._of_prompts("conversation_digest"))

    def __len__(self) -> int:
        return len(self.labels)

    def many(self, indices: np.ndarray) -> list[Row]:
        return [self._row(int(index)) for index in indices]

    def tokens(self) -> np.ndarray:
        """[records] tokens of each record, as the views read them: a completion counts once for each example."""
        total = np.zeros(len(self), dtype=np.int64)
        for rows, members in zip(self.views, self._members, strict=True):
            np.add.at(total, members, rows.tokens())
        return total

    def longest(self) -> int:
        """Tokens of the longest prompt with one branch."""
        return max(rows.longest() for rows in self.views)

    def digest(self) -> str:
        """A key of all token ids, labels and scores, in their order."""
        key = hashlib.sha256(repr([(name, rows.digest()) for name, rows in self._named()]).encode())
        for members in self._members:
            key.update(members.astype(np.int64).tobytes())
        return key.hexdigest()[:12]

    def _of_prompts(self, column: str) -> np.ndarray:
        # All examples of a record have its prompt, so it does not matter which of them is read.
        values = np.zeros(len(self.labels), dtype=np.uint64)
        for rows, members in zip(self.views, self._members, strict=True):
            values[members] = rows.table.numbers(column)
        return values

    def _named(self) -> list[tuple[str, TokenRows]]:
        return list(zip(self.names, self.views, strict=True))

    def _row(self, index: int) -> Row:
        views = []
        for (name, rows), order, starts in zip(self._named(), self._orders, self._starts, strict=True):
            view_rows = rows.many(order[starts[index] : starts[index + 1]])
            views.append(ViewRows(name, tuple(view_rows), rows.partners is not None))
        first = next(row for view in views for row in view.rows)
        # The id of an example is that of its record, # and a number.
        return joint_row(first.id.rpartition("#")[0], int(self.groups[index]), views)
