"""The rows and the account of a mixture of several views, from those of each view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from halos.data.rows.joint_rows import JointRows
from halos.data.rows.token_rows import TokenRows
from halos.data.rows.tokenise import SplitRows
from halos.data.views.joint_examples import JointExamples

V = TypeVar("V")


def of_view(view: str, report: Mapping[str, V]) -> dict[str, V]:
    """Return what was counted or measured of one of several views, with its name before each line."""
    return {f"{view}: {what}": value for what, value in report.items()}


def joined(names: Sequence[tuple[str, str]], views: Sequence[SplitRows], examples: JointExamples) -> SplitRows:
    """Return the rows of records from those of their examples in each view.

    Args:
        names: each view, and its name in the account.
        views: the rows of each view.
        examples: the examples that they were made of.
    """
    tables: list[tuple[str, TokenRows, np.ndarray]] = []
    report, truncated, lengths = Counter[str](), Counter[tuple[str, str]](), dict[str, np.ndarray]()
    for (view, name), rows, owners in zip(names, views, examples.owners, strict=True):
        assert isinstance(rows.table, TokenRows)
        tables.append((view, rows.table, owners))
        report.update(of_view(name, {"examples": len(rows), **rows.report}))
        truncated.update({(f"{name}: {what}", file): count for (what, file), count in rows.truncated.items()})
        lengths |= of_view(name, rows.lengths)
    return SplitRows(JointRows(tables), report, truncated, lengths)
