"""Rows of several tables, for work that passes over all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain

import numpy as np

from halos.data.rows.joint_rows import JointRows
from halos.data.rows.token_rows import Row, TokenRows


class ChosenRows(Collection[Row]):
    """Rows that are made while they are iterated: all rows of a large data set do not fit into memory.

    Rows of one conversation follow each other, wherever they are in the data: what they share can be computed once.

    Args:
        chosen: tables, and the indices of the rows to take of each.
    """

    def __init__(self, chosen: Sequence[tuple[TokenRows | JointRows, np.ndarray]]) -> None:
        self._chosen = [(rows, own[np.argsort(rows.conversations[own], kind="stable")]) for rows, own in chosen]

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable((rows[int(index)] for index in indices) for rows, indices in self._chosen)

    def __len__(self) -> int:
        return sum(len(indices) for _, indices in self._chosen)

    def __contains__(self, row: object) -> bool:
        return any(row == chosen_row for chosen_row in self)
