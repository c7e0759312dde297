"""Runs of a stranger: their labels, metrics, claims and samples are shown in every format, and control none of them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from halos import terminal
from halos.commands.compare import compare
from halos.comparison.claims import decide
from halos.comparison.figures import distributions
from halos.comparison.runs import group, read_runs
from halos.comparison.tables import compare_groups, latex, markdown
from tests.commands.test_compare import run
from tests.comparison.test_page import Elements
from tests.test_safe_text import BAD, rendered

LABELS = {
    "a formula": "=cmd|' /C calc'!A0",
    "a formula with a sign": "-1+cmd|' /C calc'!A0",
    "bad mathtext": r"$\frac{$",
    "mathtext": r"a $\mathbf{b}$ \$c$",
    "escape sequences": "\x1b]0;title\x07\x1b[2J\x9b31m\x1b]8;;http://x\x1b\\link",
    "overrides of the direction": "\u202ecod\u2066\u200b",
    "markup": "[bold]x[/] [/nothing] \\\\\\",
    "rows of a table": "| a | b |\n|---|---|\n| c | d |",
    "a link and a picture": "![x](http://127.0.0.1/x.png) [x](javascript:alert(1))",
    "HTML": "<img src=http://127.0.0.1/x.png onerror=alert(1)>",
    "an option of LaTeX's": "[-99cm] \\input{/etc/passwd} % & # ~ ^",
    "a star of LaTeX's": "* a",
    "NUL and separators": "a\x00b\u2028c\x0cd",
}


def report(label: str, folder: Path, seeds: int = 2) -> Path:
    """Compare runs in which everything that can be a text is the label."""
    claim = {
        "name": f"../{label}",
        "states": label,
        "metric": "samples/policy_reward",
        "measure": label,
        "figure": {"x": "loss.extra", "label": label, "lines": ["loss.name"]},
        "contrasts": [{"at": label, "of": {"loss.name": label}, "against": {"loss.name": "b"}}],
    }
    for name in (label, "b"):
        for seed in range(seeds):
            made = run(
                folder / "runs" / f"{'b' if name == 'b' else 'x'}{seed}", name, seed, 0.5 + seed / 10, extra=label
            )
            config = OmegaConf.load(made / "config.yaml")
            OmegaConf.save(OmegaConf.merge(config, {"claim": claim}), made / "config.yaml")
            summary = json.loads((made / "summary.json").read_text())
            summary["metrics"][label] = 1.0
            (made / "summary.json").write_text(json.dumps(summary))
            (made / "evaluation").mkdir()
            sample = {"prompt": f"{label} \ud800", "completions": [label]}
            (made / "evaluation" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    keys = {"runs": str(folder / "runs"), "metrics": ["samples/policy_reward", f"val/{label}"], "baseline": None}
    return compare(OmegaConf.create({**keys, "title": label, "output": str(folder / "out")}))


@pytest.mark.parametrize("kind", LABELS)
def test_a_comparison_shows_every_text_and_controls_nothing(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal.console, "_width", 1000)
    output = report(LABELS[kind], tmp_path)
    printed = capsys.readouterr().out
    texts = {file.name: file.read_text("utf-8") for file in output.iterdir() if file.suffix != ".png"}
    assert set(texts) == {f"comparison.{x}" for x in ("csv", "md", "tex", "html")} | {"verdicts.md"}
    for name, text in {"terminal": printed, **texts}.items():
        assert not set(BAD) - {"\n", "\t"} & set(text), name
    with (output / "comparison.csv").open(newline="", encoding="utf-8") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@") and not re.fullmatch(r"[-+.\de]+", cell)]
    table = texts["comparison.md"].splitlines()
    assert len(table) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}
    assert len(texts["comparison.tex"].splitlines()) == 3 + 1 + 2 + 2
    elements = Elements(texts["comparison.html"])
    assert not {"img", "script", "a"} & set(elements.names)
    assert elements.names.count("svg") == 3  # the claim, the frontier and the loss
    # The image of the claim is beside the report, whatever the claim's name is.
    (image,) = output.glob("*.png")
    html = rendered(texts["verdicts.md"])
    assert re.findall(r'src="([^"]+)"', html) == [image.name]
    assert set(re.findall(r"<(\w+)", html)) == {"p", "img"}


def test_rows_of_latex_do_not_begin_with_what_a_line_break_takes_for_an_option(tmp_path: Path) -> None:
    for n, label in enumerate(("[1cm]", "*")):
        run(tmp_path / str(n), label, 0, 0.5)
    tables = compare_groups(group(read_runs([str(tmp_path)])[0]), ["samples/kl"], None)
    rows = latex(tables).splitlines()[4:6]
    assert rows == [r"{[}1cm] & 1 & 1.000 \\", r"{*} & 1 & 1.000 \\"]
    assert markdown(tables).splitlines()[2:] == [r"| \[1cm\] | 1 | 1.000 |", r"| \* | 1 | 1.000 |"]


def test_negative_numbers_and_plain_labels_stay_as_they_are(tmp_path: Path) -> None:
    run(tmp_path / "a", "kto", 0, -0.5, beta=-1)
    run(tmp_path / "b", "kto", 0, 0.5, beta=1)
    keys: dict[str, Any] = {"runs": str(tmp_path), "metrics": ["samples/policy_reward"], "baseline": None, "title": "t"}
    output = compare(OmegaConf.create({**keys, "output": str(tmp_path / "out")}))
    lines = (output / "comparison.csv").read_text().splitlines()
    assert lines[1] == '"kto, loss.beta=-1",-0.5,,,1'


BAD_RESULTS = {
    "samples.jsonl": [
        "[",
        "3",
        '{"prompt": ["a"], "completions": ["b"]}',
        '{"prompt": "a", "completions": []}',
        "[" * 9999,
    ],
    "rewards.jsonl": ['{"reward": "1", "desirable": true}', '{"reward": 1, "desirable": [1]}', '{"reward": null}'],
    "metrics.csv": ["step,val/loss\n1,x\n", "step,val/loss\n1," + "9" * 200_000 + "\n"],
}


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_results_that_no_run_writes_are_refused_by_file_and_line(name: str, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "kto", 0, 0.9)
    file = folder / name if name == "metrics.csv" else folder / "evaluation" / name
    file.parent.mkdir(exist_ok=True)
    for text in BAD_RESULTS[name]:
        file.write_text(text)
        with pytest.raises(ValueError, match=str(folder)) as refused:
            read_runs([str(tmp_path)])
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"), [("name", ["a"]), ("figure", 3), ("contrasts", 3), ("states", {"a": 1}), ("contrasts", [3])]
)
def test_a_claim_that_no_experiment_states_is_refused(key: str, value: object, tmp_path: Path) -> None:
    claim: dict[str, Any] = {
        "name": "n",
        "states": "s",
        "metric": "m",
        "measure": "w",
        "figure": {"x": "x", "label": "l"},
    }
    claim |= {"contrasts": [{"at": "a", "of": {}, "against": {}}], key: value}
    folder = run(tmp_path / "run", "kto", 0, 0.9)
    config = OmegaConf.load(folder / "config.yaml")
    config.claim = claim
    OmegaConf.save(config, folder / "config.yaml")
    with pytest.raises(ValueError, match=rf"config\.yaml: claim.*{key}"):
        decide(read_runs([str(tmp_path)])[0])


def test_numbers_that_no_figure_can_show_are_left_out(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "kto", 0, 0.9)
    (folder / "metrics.csv").write_text("step,val/loss\n1,inf\n2,1e308\n3,nan\n4,0.5\n")
    (folder / "evaluation").mkdir()
    numbers = ("1e999", "NaN", "0.5", "-1e200", str(10**30))
    rewards = ['{"reward": ' + number + ', "desirable": true}' for number in numbers]
    (folder / "evaluation" / "rewards.jsonl").write_text("\n".join(rewards))
    (finished,) = read_runs([str(tmp_path)])[0]
    assert finished.curves == [{"step": 1.0}, {"step": 2.0}, {"step": 3.0}, {"step": 4.0, "val/loss": 0.5}]
    assert [row["reward"] for row in finished.rewards] == [0.5, 1e30]
    assert distributions(group([finished]))  # numpy counts no whole numbers of any size
