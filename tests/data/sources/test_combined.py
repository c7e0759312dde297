"""Scored replies to one prompt in separate rows: one record, wherever the rows stand."""

import json
from pathlib import Path
from typing import Any

import pytest

from halos.data.reading import files
from halos.data.records.adapted import FileCounts
from halos.data.records.record import Record
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.store.arrow import Store


def write(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def row(prompt: str, reply: str, score: float, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": reply, "score": score, **more}


def scores(records: Any) -> list[tuple[str, list[tuple[str, float | None]]]]:
    return [(str(r.prompt), [(c.text, c.score) for c in r.completions]) for r in records]


@pytest.mark.parametrize("piece", [1 << 23, 1])
def test_scored_replies_to_one_prompt_are_one_record(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", piece)  # of one byte: each row is a piece
    rows = [row("q", "a", 5), row("q", "b", 1), row("r", "a", 2), row("q", "c", 3), row("s", "a", 1)]
    file = write(tmp_path / "f.jsonl", *rows)
    source = FeedbackFiles(file)
    source.store = Store(tmp_path / "cache", 1)
    for _ in range(2):  # the second time from the cache
        read = source.train()
        assert scores(read.records) == [
            ("q", [("a", 5.0), ("b", 1.0), ("c", 3.0)]),
            ("r", [("a", 2.0)]),
            ("s", [("a", 1.0)]),
        ]
        assert [record.id for record in read.records] == [f"{file}:{n}" for n in (1, 3, 5)]
        assert (read.origins[file].rows, read.origins[file].records) == (5, 3)
    key = read.records.key  # type: ignore[attr-defined]
    assert key is not None
    assert key == source.train().records.key  # type: ignore[attr-defined]


@pytest.mark.parametrize("piece", [1 << 23, 1])
def test_several_scores_of_one_reply_become_their_mean(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", piece)
    file = write(
        tmp_path / "f.jsonl", row("q", "a", 5), row("q", "a", 1), row("q", "b", 2), row("r", "a", 1), row("q", "a", 3)
    )
    read = FeedbackFiles(file).train()
    assert scores(read.records) == [("q", [("a", 3.0), ("a", 3.0), ("b", 2.0), ("a", 3.0)]), ("r", [("a", 1.0)])]
    assert read.origins[file].noted == {"replies with several scores, of which the mean is used": 1}


def test_a_stream_joins_what_follows_each_other(tmp_path: Path) -> None:
    file = write(
        tmp_path / "f.jsonl", row("q", "a", 5), row("q", "a", 1), row("q", "b", 2), row("r", "a", 1), row("q", "c", 3)
    )
    origins: dict[str, FileCounts] = {}
    found: list[Record] = list(FeedbackFiles(file).stream(origins))
    assert scores(found) == [("q", [("a", 3.0), ("a", 3.0), ("b", 2.0)]), ("r", [("a", 1.0)]), ("q", [("c", 3.0)])]
    assert origins[file].noted == {"replies with several scores, of which the mean is used": 1}


@pytest.mark.parametrize(
    "rows",
    [
        [row("q", "a", 5, weight=2), row("q", "b", 1, weight=1)],
        [row("q", "a", 5, label=1), row("q", "b", 1, label=0)],
        # Scores of a comparison hold for its two sides alone.
        [{"prompt": "q", "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": -1}] * 2,
        [{"prompt": "q", "completions": [{"text": "a", "score": 1}, {"text": "a", "score": 2}]}] * 2,
    ],
)
def test_scores_that_cannot_be_compared_stay_apart(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert len(FeedbackFiles(write(tmp_path / "f.jsonl", *rows)).train().records) == 2


def test_scores_of_different_files_are_not_compared(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, row("q", name, 1)) for name in ("a.jsonl", "b.jsonl")]
    assert len(FeedbackFiles(paths).train().records) == 2
