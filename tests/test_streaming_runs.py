"""Whole runs on the toy world that stream: resumed to the bit, with a live reference, and what they refuse."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from halos.data.preparation.writing import record_row, write_jsonl
from halos.toy.feedback import toy_feedback
from tests.fork import run_ranks
from tests.train_runs import assert_same_run, assert_same_weights, run, run_until, train_as_rank

pytestmark = pytest.mark.runs

STREAMING = ("data.streaming=true", "data.shuffle_buffer=10", "trainer.max_steps=9", "checkpoint.every=2")
RESUMABLE = (*STREAMING, "model.dropout=0.1", "trainer.val_check_interval=0.5", "optim.lr=1e-2")
"""24 examples a pass, 36 in the run, 10 in the buffer."""


def files(folder: Path) -> tuple[str, ...]:
    for split, size in (("train", 12), ("val", 4)):
        rows = map(record_row, toy_feedback(size=size, feedback="labels", seed=0, split=split))
        write_jsonl(folder / f"{split}.jsonl", rows)
    return (
        "data=files",
        f"data.train={folder / 'train.jsonl'}",
        f"data.val={folder / 'val.jsonl'}",
        "data.max_length=64",
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, run(folder, *data, *RESUMABLE)


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 4, 7))])
def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one(
    step: int, uninterrupted: tuple[Path, dict[str, Any]], data: tuple[str, ...], tmp_path: Path
) -> None:
    run_until("on_train_batch_start", step, tmp_path, *data, *RESUMABLE)
    assert_same_run((tmp_path, run(tmp_path, *data, *RESUMABLE, "resume=auto")), uninterrupted)
    reports = [json.loads((folder / "data_report.json").read_text()) for folder in (tmp_path, uninterrupted[0])]
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_a_run_with_a_worker_and_accumulation_resumes(data: tuple[str, ...], tmp_path: Path) -> None:
    words = (*data, *RESUMABLE, "data.workers=1", "trainer.accumulate_grad_batches=2", "data.batch_size=2")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(whole, *words)
    run_until("on_train_batch_start", 5, stopped, *words)
    assert_same_run((stopped, run(stopped, *words, "resume=auto")), (whole, expected))


def test_the_report_is_written_at_the_end(uninterrupted: tuple[Path, dict[str, Any]], data: tuple[str, ...]) -> None:
    report = json.loads((uninterrupted[0] / "data_report.json").read_text())["splits"]
    file = data[1].removeprefix("data.train=")
    counts = report["train"]["files"].pop(file)
    assert not report["train"]["files"]
    assert (counts["rows"], counts["records"], counts["dropped"]) == (12, 12, {})
    counts = report["train"]["counts"]
    assert (counts["records"], counts["examples"], counts["passes"]) == (12, 24, 2)
    assert counts["tokens"] == uninterrupted[1]["tokens"]
    assert report["val"]["records"] == 4


def test_the_toy_worlds_own_feedback_can_be_streamed(tmp_path: Path) -> None:
    summary = run(tmp_path, *STREAMING)
    assert summary["steps"] == 9
    assert summary["examples"] == 36


def test_accumulated_micro_batches_are_one_large_batch(data: tuple[str, ...], tmp_path: Path) -> None:
    # SFT divides by the tokens of the whole step, which have to be known at its first micro-batch.
    words = (*data, "loss=sft", "data.streaming=true", "data.shuffle_buffer=1", "trainer.max_steps=1")
    one = run(tmp_path / "one", *words, "data.batch_size=4")
    half = run(tmp_path / "half", *words, "data.batch_size=2", "trainer.accumulate_grad_batches=2")
    assert one["train_loss"] == pytest.approx(half["train_loss"], abs=1e-6)
    assert one["tokens"] == half["tokens"]


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(data: tuple[str, ...], tmp_path: Path) -> None:
    words = (*data, *STREAMING, "trainer.max_steps=4")
    expected = run(tmp_path / "one", *words)
    both = ("strategy=ddp", "trainer.devices=2", "data.batch_size=2")
    for found in run_ranks(partial(train_as_rank, tmp_path / "two", *words, *both)):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert found["tokens"] == expected["tokens"]
    reports = [json.loads((tmp_path / name / "data_report.json").read_text()) for name in ("one", "two")]
    assert reports[0] == reports[1]


def test_a_streamed_reference_is_live_or_the_model_without_its_adapter(tmp_path: Path) -> None:
    live = run(tmp_path / "live", *STREAMING, "trainer.max_steps=2")
    cold = run(tmp_path / "cold", *STREAMING, "trainer.max_steps=2", "model.reference=live")
    assert live["train_loss"] == cold["train_loss"]
    assert live["reference_seconds"] > 0
    assert_same_weights(tmp_path / "live", tmp_path / "cold")
    run(tmp_path / "lora", *STREAMING, "trainer.max_steps=2", "model.lora.enabled=true")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model.reference=cached",), "model.reference: expected auto, live or adapter with data.streaming=true"),
        (("model.reference_path=x",), "model.reference_path: expected null"),
        (("trainer.max_steps=-1",), r"trainer.max_steps: expected the number of steps"),
        (("loss=kto_balanced",), "data.streaming: expected false"),
        (("data.stratified=true",), "data.stratified: expected false with data.streaming=true"),
        (("data.max_examples=4",), "data.max_examples: expected null with data.streaming=true"),
    ],
)
def test_what_cannot_be_streamed_is_refused(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        run(tmp_path, *STREAMING, *words)
    assert not (tmp_path / "summary.json").exists()


def test_a_mixture_of_sources_is_refused(tmp_path: Path, data: tuple[str, ...]) -> None:
    file = data[1].removeprefix("data.train=")
    with pytest.raises(ValueError, match=r"data.streaming: expected one source, found data=mix"):
        run(tmp_path, "data=mix", f"data.mix={{a: {{train: {file}}}}}", *STREAMING)


def test_other_data_are_another_run(data: tuple[str, ...], tmp_path: Path) -> None:
    run_until("on_train_batch_start", 4, tmp_path, *data, *RESUMABLE)
    with pytest.raises(ValueError, match=r"belongs to another run \(data \(train\)"):
        run(tmp_path, *data, *RESUMABLE, "data.shuffle_buffer=11", "resume=auto")


def test_a_bad_line_in_the_middle_stops_the_run_with_its_place(tmp_path: Path, data: tuple[str, ...]) -> None:
    lines = Path(data[1].removeprefix("data.train=")).read_text().splitlines()
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join([*lines[:9], '{"prompt": "q", "completion": 3}']))
    words = [word for word in data if not word.startswith("data.train=")]
    with pytest.raises(ValueError, match=r"bad.jsonl:10: expected 'completion' to be a text"):
        run(tmp_path / "out", *words, f"data.train={file}", *STREAMING, "data.shuffle_buffer=1")


def test_a_data_set_that_is_loaded_as_a_stream(tmp_path: Path, data: tuple[str, ...]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(Path(data[1].removeprefix("data.train=")).read_bytes())
    words = [word for word in data if not word.startswith("data.train=")]
    expected = run(tmp_path / "file", *data, *STREAMING)
    found = run(tmp_path / "out", *words, f"data.train={folder}", *STREAMING)
    assert found["train_loss"] == expected["train_loss"]
