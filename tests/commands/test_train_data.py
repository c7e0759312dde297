"""Runs on files: of every source, without validation data, and with data that are refused."""

import gzip
import json
import math
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from halos.data.rows import unknown
from tests.commands.test_inspect_data import ROWS
from tests.train_runs import BAD_ROW, GOOD_ROW, LABELS, SUMMARY, column, jsonl, run


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("text", "loss", "said"),
    [
        ("", "kto", r"train\.jsonl: expected at least one row, found an empty file"),
        (jsonl(GOOD_ROW, "{oops"), "kto", r"train\.jsonl:2: expected JSON"),
        (jsonl(GOOD_ROW, "[1]"), "kto", r"train\.jsonl:2: expected an object"),
        (jsonl(GOOD_ROW, {"prompt": "a"}), "kto", r"train\.jsonl:2: expected 'prompt' with"),
        (jsonl(GOOD_ROW, {**BAD_ROW, "prompt": 3}), "kto", r"train\.jsonl:2: expected 'prompt' to be a text"),
        (jsonl(GOOD_ROW, {**BAD_ROW, "label": "meh"}), "kto", r"train\.jsonl:2: expected 'label' .* found 'meh'"),
        (
            jsonl(GOOD_ROW, {**BAD_ROW, "prompt": [{"role": "robot", "content": "a"}]}),
            "kto",
            r"train\.jsonl:2: .*one of system, user, assistant, tool \(.*data\.roles\.robot=user\); found 'robot'",
        ),
        (jsonl({**GOOD_ROW, "completion": " "}), "kto", r"train\.jsonl: .*every one was left out: empty completion"),
        (jsonl(GOOD_ROW, {**BAD_ROW, "label": True}), "dpo", r"no prompt has both .*2 unpaired desirable"),
        (jsonl({**BAD_ROW}), "sft", "nothing to imitate"),
        (jsonl(GOOD_ROW, {**GOOD_ROW, "completion": "best wishes."}), "kto", "at least two different prompts"),
        (
            jsonl(GOOD_ROW, {**BAD_ROW, "prompt": "i bought a lamp. " * 20}),
            "kto",
            r"train\.jsonl:2.*data\.max_length = 64 .*found \d+; raise data\.max_length",
        ),
    ],
)
def test_bad_data_are_refused_with_their_place(text: str, loss: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "run", "data=files", f"data.train={file}", "data.max_length=64", f"loss={loss}")
    assert not (tmp_path / "run").exists()


def test_a_run_on_files_trains_and_validates(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(jsonl(*LABELS, {**GOOD_ROW, "prompt": "i bought a tent."}))
    held = tmp_path / "val.jsonl"
    held.write_text(jsonl(*({**row, "prompt": f"{row['prompt']} please."} for row in LABELS)))
    words = ["data=files", f"data.train={file}", f"data.val={held}", "trainer.max_steps=2", "trainer.max_epochs=9"]
    summary = run(tmp_path / "run", *words)
    assert len(summary["train_loss"]) == 2
    assert column(tmp_path / "run", "val/loss")[0] == pytest.approx(0.5, abs=1e-6)
    assert list(summary) == [key for key in SUMMARY if key != "samples"]


def written(folder: Path, source: str) -> Path:
    """The rows of a public set's schema in a file, of another kind for each."""
    file = folder / {"hh": "a.jsonl.gz", "shp": "a.parquet", "oasst": "a.json", "files": "a.csv"}.get(source, "a.jsonl")
    rows, lines = ROWS[source], jsonl(*ROWS[source])
    if source == "shp":
        parquet.write_table(pa.Table.from_pylist(rows), file)
    elif source == "hh":
        file.write_bytes(gzip.compress(lines.encode()))
    elif source == "files":
        file.write_text("\n".join(",".join(cells) for cells in (rows[0], *(row.values() for row in rows))))
    else:
        file.write_text(json.dumps(rows) if source == "oasst" else lines)
    return file


@pytest.mark.runs
@pytest.mark.parametrize("source", [*ROWS, "mix"])
def test_every_source_trains_from_files(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unknown, "MOST_UNKNOWN", 1.0)  # the toy model knows few of these words
    if source == "mix":
        parts = [f"{name}: {{data: {name}, train: {written(tmp_path, name)}}}" for name in ("hh", "files")]
        words = [f"data.mix={{{', '.join(parts)}}}"]
    else:
        words = [f"data.train={written(tmp_path, source)}"]
    common = ["loss=dpo", "trainer.max_steps=1", f"cache_dir={tmp_path / 'cache'}", "model.reference=live"]
    summary = run(tmp_path / "run", f"data={source}", *words, *common)
    assert summary["train_loss"] == [pytest.approx(math.log(2), abs=1e-6)]
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())["splits"]["train"]
    assert report["counts"]["examples"] == (2 if source == "mix" else 1)
    assert list((tmp_path / "cache" / "data").glob("*/*.arrow")), "records and token ids are kept"


@pytest.mark.runs
def test_without_validation_data_there_are_no_validation_metrics(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(jsonl(*LABELS))
    summary = run(tmp_path / "run", "data=files", f"data.train={file}")
    assert summary["metrics"] == {}
    assert len(summary["train_loss"]) == summary["steps"] == 1
