"""Run folders → groups, tables and a page: by configuration, over seeds, and without what has not finished."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from halos.commands.compare import compare
from halos.comparison.figures import curves
from halos.comparison.runs import group, read_runs
from halos.comparison.tables import cell_text, compare_groups, latex, markdown, terminal
from halos.terminal import PlainConsole


def run(folder: Path, loss: str, seed: int, reward: float, kl: float = 1.0, **parameters: Any) -> Path:
    folder.mkdir(parents=True)
    config = {
        "loss": {"name": loss, **parameters},
        "data": {"source": {"seed": seed}},
        "model": {"path": "x"},
        "seed": seed,
        "output_dir": str(folder),
    }
    OmegaConf.save(config, folder / "config.yaml")
    summary = {
        "steps": 2,
        "train_seconds": 1.0,
        "metrics": {"loss": 0.5},
        "samples": {"policy_reward": reward, "kl": kl},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.csv").write_text("step,val/loss,train/loss\n0,1.0,\n1,,0.7\n2,0.5,\n")
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for seed, reward in enumerate((0.7, 0.8, 0.9)):
        run(tmp_path / f"kto,{seed}", "kto", seed, reward, beta=0.1)
        run(tmp_path / f"wide,{seed}", "kto", seed, reward - 0.1, beta=0.5)
        run(tmp_path / f"sft_{seed}", "sft", seed, 0.5)
    (run(tmp_path / "dead", "sft", 9, 0.1) / "summary.json").unlink()
    return tmp_path


def test_runs_that_differ_in_their_seed_are_one_group_and_labels_say_what_differs(sweep: Path) -> None:
    runs, unfinished = read_runs([str(sweep)])
    assert {g.label: [r.seed for r in g.runs] for g in group(runs)} == {
        "kto, loss.beta=0.1": [0, 1, 2],
        "kto, loss.beta=0.5": [0, 1, 2],
        "sft": [0, 1, 2],
    }
    assert [folder.name for folder in unfinished] == ["dead"]


def test_means_over_seeds_and_paired_differences_have_students_interval(sweep: Path) -> None:
    groups = group(read_runs([str(sweep)])[0])
    table = compare_groups(groups, ["samples/policy_reward"], "kto, loss.beta=0.1")
    rows = dict(zip(table.labels, table.cells, strict=True))
    first, nothing = rows["kto, loss.beta=0.1"]
    assert nothing is None
    assert first is not None
    assert (first.value, first.n) == pytest.approx((0.8, 3))
    assert first.high == pytest.approx(0.8 + 4.302653 * 0.1 / 3**0.5, abs=1e-6)
    difference = rows["kto, loss.beta=0.5"][1]
    assert difference is not None
    # Paired by seed, the seeds' own spread is gone.
    assert (difference.value, difference.low, difference.high) == pytest.approx((-0.1, -0.1, -0.1))


def test_samples_may_hold_separators_that_only_python_takes_for_line_breaks(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "kto", 0, 0.9) / "evaluation"
    folder.mkdir()
    sample = {"prompt": "a\u2028b", "completions": ["c\x85d", "e\nf"]}
    (folder / "samples.jsonl").write_text(json.dumps(sample, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_runs([str(tmp_path)])[0][0].samples == [sample]


def test_a_command_that_ran_twice_is_refused_as_it_adds_no_seed(sweep: Path) -> None:
    run(sweep / "again", "kto", 1, 0.9, beta=0.1)
    with pytest.raises(ValueError, match=r"runs: expected one run of seed 1 of kto, .*=0.1, found .*again and .*kto,1"):
        group(read_runs([str(sweep)])[0])


def test_equal_rounds_before_different_losses_count_once(tmp_path: Path) -> None:
    for loss in ("kto", "dpo"):
        for seed in (0, 1):
            (tmp_path / f"{loss},{seed}").mkdir()
            run(tmp_path / f"{loss},{seed}" / "round0", "sft", seed, 0.5)
            run(tmp_path / f"{loss},{seed}" / "round1", loss, seed, 0.9)
    groups = group(read_runs([str(tmp_path)])[0])
    assert {g.label: [r.seed for r in g.runs] for g in groups} == {"sft": [0, 1], "dpo": [0, 1], "kto": [0, 1]}


def test_what_was_sampled_otherwise_is_another_row(tmp_path: Path) -> None:
    for seed, (tokens, shown) in enumerate([(64, 3), (64, 0), (8, 3)]):
        config = run(tmp_path / str(seed), "kto", seed, 0.5) / "config.yaml"
        sampling = {"max_new_tokens": tokens, "size": 8, "prompts": shown}
        OmegaConf.save({**OmegaConf.load(config), "sampling": sampling}, config)
    runs, _ = read_runs([str(tmp_path)])
    assert {g.label: len(g.runs) for g in group(runs)} == {
        "kto, sampling.max_new_tokens=64": 2,
        "kto, sampling.max_new_tokens=8": 1,
    }


def judged(folder: Path, opponent: str, rate: float) -> None:
    (folder / "evaluation").mkdir()
    results: dict[str, Any] = {"metrics": {"judge/win_rate": {"value": rate}, "rewards/auc": {"value": 0.5}}}
    results["win_rate"] = {"opponent": opponent}
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(results))


def test_win_rates_against_different_opponents_have_columns_of_their_own(sweep: Path) -> None:
    judged(sweep / "kto,0", "reference", 0.8)
    judged(sweep / "kto,1", "reference", 0.6)
    assert "evaluation/judge/win_rate" in compare_groups(group(read_runs([str(sweep)])[0]), None, None).metrics
    judged(sweep / "kto,2", "data", 0.1)
    table = compare_groups(group(read_runs([str(sweep)])[0]), None, None)
    cells = dict(zip(table.metrics, table.cells[table.labels.index("kto, loss.beta=0.1")], strict=True))
    found = {name: (cell.value, cell.n) for name, cell in cells.items() if cell is not None and "evaluation" in name}
    assert found == {
        "evaluation/judge/win_rate against data": (0.1, 1),
        "evaluation/judge/win_rate against reference": (pytest.approx(0.7), 2),
        "evaluation/rewards/auc": (0.5, 3),
    }


def test_every_file_is_written_and_the_page_needs_nothing_else(sweep: Path, tmp_path: Path) -> None:
    cfg = OmegaConf.create(
        {"runs": str(sweep), "metrics": None, "baseline": None, "title": "A <sweep>", "output": str(tmp_path / "out")}
    )
    page = (compare(cfg) / "comparison.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "A &lt;sweep&gt;" in page
    assert page.count("<svg") == 2  # the frontier and the loss
    assert "1 unfinished" in page
    assert not re.search(r"(src|href)=\"(?!#)", page.replace('xlink:href="#', ""))
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        f"comparison.{x}" for x in ("csv", "md", "tex", "html")
    }


def test_a_small_negative_number_is_no_negative_zero(tmp_path: Path) -> None:
    run(tmp_path / "run", "kto", 0, -1e-5)
    assert "| kto | 1 | 0.000 |" in markdown(compare_groups(group(read_runs([str(tmp_path)])[0]), None, None))


def test_tables_escape_what_their_language_reads(sweep: Path) -> None:
    groups = group(read_runs([str(sweep)])[0])
    table = compare_groups(groups, ["samples/policy_reward"], None)
    assert r"samples/policy\_reward \\" in latex(table)
    assert r"sft & 3 & 0.500 $\pm$ 0.000 \\" in latex(table)
    assert "| sft | 3 | 0.500 ± 0.000 |" in markdown(table)


@pytest.mark.parametrize("baseline", [None, "kto, loss.beta=0.1"])
def test_a_narrow_console_shows_every_number_and_name_whole(sweep: Path, baseline: str | None) -> None:
    for folder in sweep.glob("*[0-9]"):
        judged(folder, "reference", 0.5)
    table = compare_groups(group(read_runs([str(sweep)])[0]), None, baseline)
    out = io.StringIO()
    console = PlainConsole(width=80, file=out)
    for part in terminal(table, console):
        console.print(part)
        # The differences start a table of their own.
        assert len({str(column.header).startswith("Δ") for column in part.columns[2:]}) == 1
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for cells in table.cells:
        for cell in cells:
            assert cell_text(cell) in text
    words = text.split()
    for name in table.metrics:
        assert set(re.split("[/_ ]", name)) <= set(words)


def test_a_metric_that_the_baseline_lacks_has_no_column_of_differences(sweep: Path) -> None:
    judged(sweep / "kto,0", "reference", 0.8)
    groups = group(read_runs([str(sweep)])[0])
    table = compare_groups(groups, ["evaluation/judge/win_rate", "samples/kl"], "sft")
    assert table.metrics == ["evaluation/judge/win_rate", "samples/kl", "Δ samples/kl"]
    assert {len(row) for row in table.cells} == {3}


def test_what_fits_on_a_line_is_one_table(sweep: Path) -> None:
    table = compare_groups(group(read_runs([str(sweep)])[0]), ["samples/kl", "val/loss"], "sft")
    assert len(terminal(table, PlainConsole(width=100))) == 1
    assert len(terminal(table, PlainConsole(width=80))) == 2


def test_a_legend_of_long_labels_leaves_room_for_the_curves(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for n in range(12):
        run(tmp_path / str(n), "kto", 0, 0.5, **{"a_parameter_with_a_long_name" * 2: n})
    figures = curves(group(read_runs([str(tmp_path)])[0]))
    assert list(figures) == ["loss"]
    assert not [str(w.message) for w in recwarn if "constrained_layout" in str(w.message)]


def test_what_is_not_there_is_named(sweep: Path, tmp_path: Path) -> None:
    groups = group(read_runs([str(sweep)])[0])
    with pytest.raises(ValueError, match=r"metrics: expected some of .*samples/kl.*found 'nope'"):
        compare_groups(groups, ["nope"], None)
    with pytest.raises(ValueError, match=r"baseline: expected one of kto, loss.beta=0.1; .*found 'dpo'"):
        compare_groups(groups, None, "dpo")
    with pytest.raises(ValueError, match="runs: no such folder"):
        read_runs([str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="runs: expected finished runs"):
        read_runs([str(tmp_path / "empty")])


LIGHT = """
import sys
from pathlib import Path

def heavy():
    return sorted({"torch", "lightning", "transformers", "scipy.stats", "halos.policy"} & sys.modules.keys())

from halos.comparison import claim_figure, page, runs, tables
finished, unfinished = runs.read_runs([sys.argv[1]])
groups = runs.group(finished)
page.page("title", groups, tables.compare_groups(groups, None, None), len(unfinished))
assert not heavy(), heavy()
from halos.commands.compare import compare
assert not heavy(), heavy()
from omegaconf import OmegaConf
keys = {"runs": sys.argv[1], "metrics": None, "baseline": None, "title": "t", "output": sys.argv[2]}
compare(OmegaConf.create(keys))
assert not heavy(), heavy()
"""


@pytest.mark.long
def test_comparing_imports_neither_torch_nor_lightning_nor_a_policy(tmp_path: Path) -> None:
    for seed in (0, 1):
        run(tmp_path / "runs" / str(seed), "kto", seed, 0.5)
    words = [sys.executable, "-c", LIGHT, str(tmp_path / "runs"), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "comparison.html").is_file()
