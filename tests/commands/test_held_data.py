"""The records that a command works on are those that training held out."""

import json
from pathlib import Path
from typing import Any

import pytest

from halos.commands.held_data import read_data
from halos.data.preparation.intake import LEAKED
from halos.data.preparation.needs import DataNeeds
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.streaming.module import StreamingDataModule
from halos.evaluation.heldout import held_out
from tests.configs import compose


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_first_records_of_a_streamed_run_are_its_held_out_ones(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n % 5}", "completion": f"a{n}", "label": n % 2} for n in range(12)]
    file = written(tmp_path / "t.jsonl", rows)
    node = compose("data=files", f"data.train={file}", "data.val_size=2", "data.streaming=true").data
    preparation = StreamingDataModule(FeedbackFiles(str(file)), val_size=2).preparation
    intake = preparation.read()
    preparation.derive(intake, DataNeeds(view="binary"))
    held = read_data(node, None, "val", 0).records
    assert [record.id for record in held] == [f"{file}:1", f"{file}:2"]
    assert {f"{record.id}#0" for record in held} == {example.id for example in intake.examples["val"].views[0]}
    rest = read_data(node, None, "train", 0).records
    assert [record.id for record in rest] == [f"{file}:{n + 1}" for n in range(12) if n % 5 > 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_prompt_of_both_files_is_left_out_where_training_leaves_it_out(streaming: bool, tmp_path: Path) -> None:
    train = written(tmp_path / "t.jsonl", [{"prompt": f"q{n}", "completion": "a", "label": n % 2} for n in range(4)])
    val = written(tmp_path / "v.jsonl", [{"prompt": p, "completion": "a", "label": 1} for p in ("Q2 ", "new", "q3")])
    words = (f"data.train={train}", f"data.val={val}", f"data.streaming={streaming}")
    node = compose("data=files", *words).data
    found = {split: read_data(node, None, split, 0) for split in ("train", "val")}
    prompts = {split: [record.prompt for record in data.records] for split, data in found.items()}
    if streaming:
        assert prompts == {"train": ["q0", "q1"], "val": ["Q2 ", "new", "q3"]}
    else:
        assert prompts == {"train": ["q0", "q1", "q2", "q3"], "val": ["new"]}
    assert found["val"].report == ({} if streaming else {LEAKED: 2})


def test_scores_become_the_labels_that_training_makes_of_them(tmp_path: Path) -> None:
    train = written(tmp_path / "t.jsonl", [{"prompt": f"q{n}", "completion": "a", "score": n} for n in range(5)])
    val = written(tmp_path / "v.jsonl", [{"prompt": f"v{n}", "completion": "a", "score": n} for n in (1, 3, 7, 8)])
    words = (f"data.train={train}", f"data.val={val}")
    data = read_data(compose("data=files", *words, "data.select.labels_from_scores=median").data, None, "val", 0)
    held = held_out(data.records, data.selection, data.training)
    assert [desirable for _, desirable in held.labels] == [False, True, True, True]  # above or below 2
    counts = {name: held.report[f"binary: {name} by their scores"] for name in ("desirable", "undesirable")}
    assert counts == {"desirable": 3, "undesirable": 1}
    plain = read_data(compose("data=files", *words).data, None, "val", 0)
    with pytest.raises(ValueError, match=r"data\.select\.labels_from_scores"):
        held_out(plain.records, plain.selection, plain.training)


def test_nothing_held_out_is_refused(tmp_path: Path) -> None:
    train = written(tmp_path / "t.jsonl", [{"prompt": "q", "completion": "a", "label": True}])
    with pytest.raises(ValueError, match="split: expected held-out records"):
        read_data(compose("data=files", f"data.train={train}").data, None, "val", 0)


def test_no_data_and_unknown_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="data: expected data=toy"):
        read_data(None, None, "val", 0)
    with pytest.raises(ValueError, match="split: expected val or train, found 'test'"):
        read_data(compose("data=toy").data, None, "test", 0)
