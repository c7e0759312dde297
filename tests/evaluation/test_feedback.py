"""The records that a command works on are those that training held out."""

import json
from pathlib import Path

import pytest

from halos.data.sources import JsonSource
from halos.data.streaming import StreamingDataModule
from halos.evaluation.feedback import Asked, distinct_prompts, read_data
from tests.test_config import compose


def test_the_first_records_of_a_streamed_run_are_its_held_out_ones(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    rows = [{"prompt": f"q{n % 5}", "completion": f"a{n}", "label": n % 2} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    node = compose("data=json", f"data.train={file}", "data.val_size=2", "data.streaming=true").data
    made = StreamingDataModule(JsonSource(str(file)), val_size=2)
    made.load("binary")
    held = read_data(node, None, "val", 0).records
    assert [record.id for record in held] == [f"{file}:1", f"{file}:2"]
    assert {f"{record.id}#0" for record in held} == {example.id for example in made.intake.examples["val"]}
    rest = read_data(node, None, "train", 0).records
    assert [record.id for record in rest] == [f"{file}:{n + 1}" for n in range(12) if n % 5 > 1]


def test_prompts_of_a_file_are_asked_once_each(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    rows = [{"prompt": f"q{n % 5}", "completion": f"a{n}", "label": n % 2} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_data(compose("data=json", f"data.train={file}").data, None, "train", 0).records
    expected = [Asked(f"{file}:{n + 1}", f"q{n}") for n in range(5)]
    assert distinct_prompts(records, None, 0) == expected
    drawn = distinct_prompts(records, 3, 0)
    assert len(drawn) == 3
    assert drawn == [asked for asked in expected if asked in drawn]


def test_no_prompts_are_an_error() -> None:
    with pytest.raises(ValueError, match="split: expected records with prompts, found none"):
        distinct_prompts([], None, 0)
