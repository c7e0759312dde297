"""``scripts/data.py``: every kind of source through its command, its outputs, and its errors."""

import json
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import DictConfig

from halos.commands.inspect_data import inspect_data
from halos.config.folder import config_folder
from tests.data.test_golden import TREE, shp
from tests.test_safe_text import BAD

HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
RAW = {"instruction": "q", "completions": [{"response": f"{n}", "overall_score": n} for n in range(4)]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "files": [{"prompt": "q", "chosen": "a", "rejected": "b"}],
    "hh": [HH],
    "shp": [shp(0, 1, 3.0)],
    "oasst": TREE,
    "ultrafeedback": [RAW],
}


def compose(*words: str) -> DictConfig:
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        return hydra.compose("inspect", list(words))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("source", sorted(ROWS))
def test_every_source_is_shown_converted_and_reported(
    tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "in.jsonl", ROWS[source])
    out = tmp_path / "out.jsonl"
    words = (f"data={source}", f"data.train={file}", "view=pairs", f"convert={out}", f"output_dir={tmp_path}/o")
    inspect_data(compose(*words, f"plot={tmp_path}/lengths.png"))
    printed = capsys.readouterr().out
    assert "chosen:" in printed
    assert "rejected:" in printed
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["preferences"] for row in written] == [[[0, 1]]]
    report = json.loads((tmp_path / "o" / "data_report.json").read_text())
    assert report["splits"]["train"]["files"][str(file)]["rows"] == len(ROWS[source])
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    # From pairs to labels, by way of the file that was written.
    inspect_data(compose(f"data.train={out}", "view=binary", f"convert={tmp_path}/labels.jsonl", "show=0"))
    labels = [json.loads(line)["completions"] for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [item["desirable"] for (item,) in labels] == [True, False]


def test_a_mixture(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{name}.jsonl", ROWS[name]) for name in ("hh", "files"))
    data = inspect_data(compose("data=mix", f"data.mix={{a: {{data: hh, train: {one}}}, b: {{train: {two}, cap: 1}}}}"))
    assert len(data.records["train"]) == 2


def test_tools_and_calls_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    row = {"prompt": "q", "completion": [call], "tools": [{"name": "g"}], "chat_template_kwargs": {"tone": "kind"}}
    inspect_data(compose(f"data.train={write(tmp_path / 'a.jsonl', [row])}", "view=demonstrations", "show=1"))
    printed = capsys.readouterr().out
    for shown in ('tools: [{"name": "g"}]', 'kwargs: {"tone": "kind"}', "user: q", 'completion: {"tool_calls": [{"na'):
        assert shown in printed


def test_scored_tokens_are_marked_with_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "please help", "completion": "thank you", "label": True}])
    inspect_data(compose("model=toy", f"data.train={file}", "view=binary", "show=1", f"output_dir={tmp_path}"))
    assert "⟦" in capsys.readouterr().out
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert "completion (tokens)" in report["splits"]["train"]["lengths"]


EVIL = "\x1b]52;c;AAAA\x07\x1b[2J\x9b31m\u202e [/x] [bold]" + "\\" * 3


@pytest.mark.parametrize("model", [(), ("model=toy",)], ids=["texts", "tokens"])
def test_what_the_data_hold_does_not_control_the_terminal(
    model: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"{EVIL}{n}", "prompt": f"{EVIL}?", "completion": EVIL, "label": n == 0} for n in range(2)]
    rows.append({"id": EVIL, "prompt": EVIL, "completion": "", "label": True})
    file = write(tmp_path / "a[b]\x1b[2J.jsonl", rows)
    inspect_data(compose(*model, f"data.train='{file}'", "view=binary"))
    printed = capsys.readouterr().out
    assert not set(BAD) - {"\n", "\t"} & set(printed)
    if not model:  # the toy model's tokenizer drops what is in no word
        assert r"\x1b]52;c;AAAA\x07\x1b[2J\x9b31m\u202e [/x] [bold]" + "\\" * 3 in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["view=labels"], "view: expected one of demonstrations, binary, pairs, scored or null, found 'labels'"),
        (["model=toy"], "model.path: expected a view whose examples to tokenise, found view=null"),
        (["convert=out.csv"], "convert: expected a file that ends in .jsonl"),
    ],
)
def test_what_makes_no_sense(tmp_path: Path, words: list[str], said: str) -> None:
    file = write(tmp_path / "a.jsonl", ROWS["files"])
    with pytest.raises(ValueError, match=said):
        inspect_data(compose(f"data.train={file}", *words))
