"""Pairs without the margins or scores that a loss reads are refused before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halos.data.preparation.needs import DataNeeds, RowNeeds
from halos.data.preparation.prepare import Preparation
from halos.data.rows.chat_tokens import Limits
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.streaming.module import StreamingDataModule
from tests import tiny

PAIR = {"prompt": "hello", "chosen": "good", "rejected": "bad"}


def prepare(folder: Path, needs: DataNeeds, *rows: dict[str, Any], streaming: bool = False) -> None:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(PAIR | {"prompt": f"hello {n}"} | row) + "\n" for n, row in enumerate(rows)))
    source, tokenizer = FeedbackFiles(str(file)), tiny.bpe_tokenizer(tiny.CHATML)
    if streaming:
        StreamingDataModule(source, max_length=50).prepare(needs, tokenizer)
    else:
        Preparation(source=source, limits=Limits(50)).prepare(needs, tokenizer)


MARGINS, SCORES = (
    DataNeeds(view="pairs", flags=RowNeeds(margins=True)),
    DataNeeds(view="pairs", flags=RowNeeds(pair_scores=True)),
)


def scores(chosen: float, rejected: float) -> dict[str, float]:
    return {"score_chosen": chosen, "score_rejected": rejected}


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_without_a_margin_are_counted_and_the_first_is_named(tmp_path: Path, streaming: bool) -> None:
    error = r"loss\.margin_weight: expected a margin for every pair, found none for 2 of 3 \(.*rows\.jsonl:2#0, …\)"
    with pytest.raises(ValueError, match=error):
        prepare(tmp_path, MARGINS, {"margin": 1.0}, {}, scores(0.9, 0.1), streaming=streaming)
    prepare(tmp_path, MARGINS, {"margin": 1.0}, {"margin": 0}, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("row", [{}, {"margin": 1.0}, scores(1.2, 0.1), scores(0.5, -0.1)])
def test_pairs_without_two_scores_that_are_probabilities_are_refused(
    tmp_path: Path, streaming: bool, row: dict[str, float]
) -> None:
    with pytest.raises(
        ValueError, match=r"loss\.soft: expected two scores in \[0, 1\] for every pair, found none for 1"
    ):
        prepare(tmp_path, SCORES, scores(1, 0), row, streaming=streaming)
    prepare(tmp_path, SCORES, scores(1, 0), scores(0.6, 0.5), streaming=streaming)


def test_other_losses_take_pairs_without_either(tmp_path: Path) -> None:
    prepare(tmp_path, DataNeeds(view="pairs"), {}, {"margin": 1.0})
