"""Votes of several people: each rule by hand, in one row and in several rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from halos.data.layouts.votes import VoteRule, vote_count
from halos.data.records.record import Record
from halos.data.sources.feedback_files import FeedbackFiles

UNDECIDED = "filtered: completions whose votes do not decide (data.votes)"
COMBINED = "filtered: rows combined with one that has the same reply and another label (data.votes)"


@pytest.mark.parametrize(
    ("rule", "up", "down", "expected"),
    [
        ("majority", 7, 2, (True, 1.0)),
        ("majority", 2, 7, (False, 1.0)),
        ("majority", 2, 2, None),
        ("weights", 7, 2, (True, 5 / 9)),
        ("weights", 0, 3, (False, 1.0)),
        (0.7, 7, 3, (True, 1.0)),
        (0.7, 3, 7, (False, 1.0)),
        (0.7, 6, 4, None),
        (1, 4, 0, (True, 1.0)),
        (1, 4, 1, None),
    ],
)
def test_the_rules(rule: str | float, up: int, down: int, expected: tuple[bool, float] | None) -> None:
    assert VoteRule(rule).verdict(up, down) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(3, 3), ("3", 3), (2.0, 2), (True, 1), ("False", 0), ("", 0), (None, 0)]
)
def test_counts_of_votes(value: object, expected: int) -> None:
    assert vote_count("f:1", "up", value) == expected


@pytest.mark.parametrize("value", [-1, 1.5, "many", [], float("nan"), float("inf")])
def test_what_is_no_count(value: object) -> None:
    with pytest.raises(ValueError, match="f:1: expected 'up' to be a number of votes"):
        vote_count("f:1", "up", value)


def read(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> tuple[list[Record], dict[str, int], dict[str, int]]:
    file = tmp_path / "f.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    records = FeedbackFiles(str(file), **options).train()
    origin = records.origins[str(file)]
    assert origin.records == len(records.records)
    return list(records.records), dict(records.dropped), dict(origin.noted)


def judged(records: list[Record]) -> list[tuple[str, bool | None, float]]:
    return [(str(record.prompt), record.completions[0].desirable, record.weight) for record in records]


@pytest.mark.parametrize("votes", [{"up": 7, "down": 2}, ["up"] * 7 + ["down"] * 2, {"👍": 7, "👎": 2, "no": 0}])
def test_votes_of_a_row(votes: object, tmp_path: Path) -> None:
    row: dict[str, Any] = {"prompt": "q", "completion": "a", "votes": votes, "weight": 3}
    records, dropped, noted = read(tmp_path, row, votes="weights")
    assert judged(records) == [("q", True, 3 * 5 / 9)]
    assert (dropped, noted) == ({}, {"completions whose votes disagree": 1})


def test_votes_that_do_not_decide_are_left_out(tmp_path: Path) -> None:
    votes = [{"up": 2, "down": 2}, {"up": 2, "down": 1}, {"up": 2}, {}]
    rows: list[dict[str, Any]] = [{"prompt": f"q{n}", "completion": "a", "votes": vote} for n, vote in enumerate(votes)]
    records, dropped, noted = read(tmp_path, *rows)
    assert judged(records) == [("q1", True, 1.0), ("q2", True, 1.0), ("q3", None, 1.0)]
    assert (dropped, noted) == ({UNDECIDED: 1}, {"completions whose votes disagree": 2})
    assert judged(read(tmp_path, *rows, votes=0.9)[0]) == [("q2", True, 1.0), ("q3", None, 1.0)]


def test_two_columns_count_votes(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"q": "q", "a": "a", "plus": 1, "minus": 4},
        {"q": "r", "a": "a", "plus": None, "minus": None},
    ]
    columns = {"prompt": "q", "completion": "a", "votes": ["plus", "minus"]}
    records, _, _ = read(tmp_path, *rows, columns=columns, votes="weights")
    assert judged(records) == [("q", False, 0.6), ("r", None, 1.0)]


@pytest.mark.parametrize("votes", [[1, 2], {"up": "x"}, {"perhaps": 1}, {"up": -1}, "up", 3])
def test_malformed_votes(votes: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"f\.jsonl:1: expected 'votes"):
        read(tmp_path, {"prompt": "q", "completion": "a", "votes": votes})


def rows_of(*labels: tuple[str, str, int], **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": reply, "label": label, **more} for prompt, reply, label in labels]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("majority", [("q", True, 1.0), ("r", False, 1.0), ("r", False, 1.0)]),
        ("weights", [("q", True, 1 / 3), ("r", False, 1.0), ("r", False, 1.0)]),
        (0.9, [("r", False, 1.0), ("r", False, 1.0)]),
    ],
)
def test_rows_that_disagree_about_a_reply_are_votes(
    rule: str | float, expected: list[tuple[str, bool, float]], tmp_path: Path
) -> None:
    # Rows that agree about r stay two examples; s is a tie under every rule.
    rows = rows_of(
        ("q", "a", 1), ("r", "a", 0), ("q", "a", 0), ("s", "a", 1), ("s", "a", 0), ("r", "a", 0), ("q", "a", 1)
    )
    records, dropped, noted = read(tmp_path, *rows, votes=rule)
    assert judged(records) == expected
    assert noted == {"completions whose votes disagree": 2}
    assert dropped == ({UNDECIDED: 2} if rule == 0.9 else {UNDECIDED: 1, COMBINED: 2})
    assert records[0].id == f"{tmp_path}/f.jsonl:{2 if rule == 0.9 else 1}"


def test_rows_weigh_as_votes_by_their_weight(tmp_path: Path) -> None:
    rows = [*rows_of(("q", "a", 1), weight=5), *rows_of(("q", "a", 0), ("q", "a", 0), weight=2)]
    records, _, _ = read(tmp_path, *rows, votes="weights")
    assert judged(records) == [("q", True, pytest.approx(1 / 9 * 3))]


def test_annotators_of_a_comparison(tmp_path: Path) -> None:
    chosen = [{"result": [{"value": {"selected": side}}]} for side in ("left", "left", "left", "right")]
    row = {"data": {"prompt": "q", "answer1": "a", "answer2": "b"}, "annotations": chosen}
    (record,), _, noted = read(tmp_path, row, votes="weights")
    assert (record.preferences, record.weight) == (((0, 1),), 0.5)
    assert noted == {"tasks whose annotators disagree": 1}
    with pytest.raises(ValueError, match=r"every one was left out: filtered: ties"):
        read(tmp_path, row, votes=0.8)
