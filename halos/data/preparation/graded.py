"""Refuses pairs that lack the margins or scores that a loss reads, before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from halos.data.rows.token_rows import Row, TokenRows, graded

if TYPE_CHECKING:
    from halos.data.preparation.needs import DataNeeds


def check_graded(rows: Sequence[Row], needs: DataNeeds) -> None:
    """Check that each pair has the margin, or the two scores in [0, 1], that a loss needs.

    Raises:
        ValueError: naming the parameter of the loss, how many pairs lack them, and the first of these.
    """
    if not (needs.flags.margins or needs.flags.pair_scores):
        return
    values = rows.graded() if isinstance(rows, TokenRows) else np.array([graded(row) for row in rows])
    if needs.flags.margins:
        hint = "set loss.margin_weight=0, or add a column margin (data.columns.margin=…)"
        _refuse(rows, np.isnan(values[:, 0]), "loss.margin_weight: expected a margin for every pair", hint)
    if needs.flags.pair_scores:
        # NaN compares as false, so pairs without scores are refused too.
        inside = np.logical_and(values[:, 1:] >= 0, values[:, 1:] <= 1).all(axis=1)
        hint = "set loss.soft=false, or add score_chosen and score_rejected"
        _refuse(rows, np.logical_not(inside), "loss.soft: expected two scores in [0, 1] for every pair", hint)


def _refuse(rows: Sequence[Row], bad: np.ndarray, expected: str, hint: str) -> None:
    if bad.any():
        first = rows[int(bad.argmax())].id
        raise ValueError(f"{expected}, found none for {int(bad.sum()):,} of {len(rows):,} ({first}, …); {hint}")
