"""The row of a record that several views read."""

from __future__ import annotations

from halos.data.rows.joint_rows import by_view, joint_row, places, sizes_by_view
from halos.data.rows.token_rows import Row, ViewRows

PROMPT, A, B, M = (1, 2), (3, 4, 5), (6,), (7, 8)


def row(*branches: tuple[int, ...], **more: object) -> Row:
    return Row("r#0", 0, PROMPT, branches, **more)  # type: ignore[arg-type]


def test_each_completion_is_there_once_and_mismatched_ones_come_last() -> None:
    pairs = ViewRows("pairs", (row(A, B),))
    binary = ViewRows("binary", (row(A, B, desirable=True), row(B, M, desirable=False)), mismatched=True)
    joint = joint_row("r", 3, [binary, pairs, ViewRows("demonstrations", (row(A),))])
    # B is a reply of its own and, after another one's example, a mismatched one: the latter gets no gradient.
    assert (joint.id, joint.group, joint.prompt) == ("r", 3, PROMPT)
    assert joint.branches == (A, B, B, M)
    assert joint.mismatched == 2
    assert [places(joint, view) for view in joint.views] == [[[0, 2], [1, 3]], [[0, 1]], [[0]]]
    assert [view.branches for view in joint.views] == [2, 2, 1]


def test_completions_with_other_scored_tokens_are_two() -> None:
    partly = row(A, context=(((0, 1),),))
    joint = joint_row("r", 0, [ViewRows("demonstrations", (partly,)), ViewRows("scored", (row(A, score=1.0),))])
    assert joint.branches == (A, A)
    assert joint.context == (((0, 1),), ())
    assert [places(joint, view) for view in joint.views] == [[[0]], [[1]]]


def test_rows_by_view() -> None:
    alone = [row(A), row(B)]
    assert by_view(alone) == [alone]
    views = [ViewRows("pairs", ()), ViewRows("demonstrations", (row(A), row(B)))]
    records = [joint_row("r", 0, views), joint_row("s", 1, views)]
    assert [len(rows) for rows in by_view(records)] == [0, 4]
    assert [sizes.tolist() for sizes in sizes_by_view(records)] == [[], [4]]
