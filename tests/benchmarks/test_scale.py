"""Both sides of the preparation's benchmark make the same token ids."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks import scale_parts
from benchmarks.scale import feedback, write_model


def test_both_make_the_same_token_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(feedback(60))
    assert 350 < sum(len(json.dumps(row)) for row in rows) / 60 < 650
    (tmp_path / "feedback.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_model(tmp_path / "model", tmp_path / "feedback.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "model"))
    monkeypatch.setattr(scale_parts, "PROCESSES", 1)
    monkeypatch.setattr(scale_parts, "LENGTHS", {"max_length": 10_000})
    ours, theirs = (make(tmp_path, tokenizer) for make in (scale_parts.ours, scale_parts.theirs))
    assert [(list(row.prompt), list(row.branches[0])) for row in ours] == list(
        zip(theirs["prompt_ids"], theirs["completion_ids"], strict=True)
    )
    assert len(ours) == 60
    assert max(len(row.prompt) + len(row.branches[0]) for row in ours) < 256, "the benchmark's limit cuts nothing"
