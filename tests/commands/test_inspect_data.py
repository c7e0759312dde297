"""``scripts/data.py``: every kind of source through its command, its outputs, and its errors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import DictConfig

from halos.commands.builders import build_data
from halos.commands.inspect_data import inspect_data, preparation_of
from halos.config.folder import config_folder
from halos.data.preparation.prepare import Preparation
from halos.data.rows.chat_tokens import Limits
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


def test_labels_of_steps_are_shown_and_kept_with_their_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [{"text": "One.", "label": True}, {"text": " Two.", "label": False}]
    file = write(tmp_path / "in.jsonl", [{"prompt": "q", "steps": steps, "label": False}])
    inspect_data(compose(f"data.train={file}", "view=steps", "show=3"))
    printed = capsys.readouterr().out
    shown = [line.split() for line in printed.splitlines() if "desirable" in line]
    assert shown[:3] == [
        ["undesirable:", "One.", "Two."],
        ["desirable", "step:", "One."],
        ["undesirable", "step:", "Two."],
    ]
    out = tmp_path / "out.jsonl"
    inspect_data(compose(f"data.train={file}", f"convert={out}"))
    assert json.loads(out.read_text())["completions"] == [{"text": "One. Two.", "desirable": False, "steps": steps}]
    with pytest.raises(ValueError, match=r"^convert: expected view=null or another view, found steps"):
        inspect_data(compose(f"data.train={file}", "view=steps", f"convert={out}"))


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
    row = {"prompt": "i bought a tent.", "completion": "i bought a tent.", "label": True}
    file = write(tmp_path / "a.jsonl", [row])
    inspect_data(compose("model=toy", f"data.train={file}", "view=binary", "show=1", f"output_dir={tmp_path}"))
    assert "⟦" in capsys.readouterr().out
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert "completion (tokens)" in report["splits"]["train"]["lengths"]


EVIL = "\x1b]52;c;AAAA\x07\x1b[2J\x9b31m\u202e [/x] [bold]" + "\\" * 3


@pytest.mark.parametrize("model", [(), ("model=toy",)], ids=["texts", "tokens"])
def test_what_the_data_hold_does_not_control_the_terminal(
    model: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halos.data.rows.unknown.MOST_UNKNOWN", 1)
    rows = [{"id": f"{EVIL}{n}", "prompt": f"{EVIL}{n}?", "completion": EVIL, "label": n == 0} for n in range(2)]
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
        (["view=labels"], "view: expected one of demonstrations, binary, steps, pairs, scored or null, found 'labels'"),
        (["model=toy"], "model.path: expected a view whose examples to tokenise, found view=null"),
        (["convert=out.csv"], "convert: expected a file that ends in .jsonl"),
    ],
)
def test_what_makes_no_sense(tmp_path: Path, words: list[str], said: str) -> None:
    file = write(tmp_path / "a.jsonl", ROWS["files"])
    with pytest.raises(ValueError, match=said):
        inspect_data(compose(f"data.train={file}", *words))


def test_data_are_prepared_as_by_a_run(tmp_path: Path) -> None:
    # Every setting has another value than its default, so that none can be forgotten.
    words = [
        *("data.text=rendered", "data.train_on=all", "data.strict=true", "data.val_size=3", "data.max_examples=7"),
        *("data.max_val_examples=2", "data.max_length=99", "data.max_prompt_length=11", "data.num_proc=1", "seed=5"),
        *(
            "data.max_expansion=9",
            "data.max_characters=999",
            "data.select.one_per_prompt=true",
            f"cache_dir={tmp_path}",
            f"data.train={tmp_path / 'a.jsonl'}",
        ),
    ]
    cfg = compose(*words)
    here, run = vars(preparation_of(cfg)), vars(build_data(cfg.data, seed=5, cache_dir=cfg.cache_dir).preparation)
    assert here.keys() == run.keys()
    plain = Preparation(source=here["source"], limits=Limits(512))
    for name in here:
        assert (vars(here[name]), type(here[name])) == (vars(run[name]), type(run[name])) if name == "source" else True
        assert name == "source" or here[name] == run[name] != getattr(plain, name)


def test_looking_at_data_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    file = tmp_path / "thumbs.csv"
    file.write_text("question,answer,thumb\nq,a,up\nq,b,down\n", encoding="utf-8")
    code = (
        "import sys; from halos.cli import main_command; sys.argv[0] = 'data'; main_command('data');"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'torchmetrics', 'scipy', 'matplotlib'};"
        "print('imported:', sorted(heavy & set(sys.modules)))"
    )
    words = [f"data.train={file}", "view=binary", f"cache_dir={tmp_path / 'cache'}"]
    out = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout
    assert "desirable" in out
    assert out.splitlines()[-1] == "imported: []"


def test_a_mapping_is_proposed_and_reads_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [{"topic": f"q{n}", "essay": "an essay", "verdict": "up", "context": "c"} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    target = tmp_path / "conf" / "data" / "mine.yaml"
    code = "import sys; from halos.cli import main_command; sys.argv[0] = 'data'; main_command('data')"
    read = ["--config-dir", str(tmp_path / "conf"), "data=mine", f"output_dir={tmp_path}"]
    for words in ([f"data.train={file}", f"propose={target}"], read):
        subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    report = json.loads((tmp_path / "data_report.json").read_text())["splits"]["train"]["files"][str(file)]
    uses = ["topic: prompt", "essay: completion", "verdict: label", "context: input"]
    assert report["columns"] == dict.fromkeys(uses, 3)
