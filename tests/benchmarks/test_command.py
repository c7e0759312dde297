"""The command line of the benchmark."""

import json
from pathlib import Path

import pytest

from benchmarks import command, liger_side
from benchmarks.inputs import pairs_file
from benchmarks.sections import SECTIONS, planned


def test_defaults_make_a_synthetic_plan(tmp_path: Path) -> None:
    words = ["--hidden=64", "--layers=1", "--vocabulary=50", "--peers=plain", f"--output={tmp_path}", "--pairs=3"]
    plan = command.plan_of(command.parser().parse_args(words))
    assert (plan.losses, plan.precisions, plan.peers) == (("kto", "dpo"), ("32-true", "bf16-mixed"), ("plain",))
    assert (Path(plan.base.model) / "model.safetensors").exists()
    rows = [json.loads(line) for line in Path(plan.base.data).read_text().splitlines()]
    assert [len(row["prompt"].split()) for row in rows] == [96] * 3
    assert [len(row["chosen"].split()) + 1 for row in rows] == [48] * 3
    assert all(planned(name, plan) > 0 for name in SECTIONS)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--model=x"], "expected --model and --data together"), (["--data=x"], "expected --model and --data together")],
)
def test_half_a_case_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        command.plan_of(command.parser().parse_args([*words, "--peers=plain", f"--output={tmp_path}"]))


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parser().parse_args(["--peers=unsloth"])
    assert "expected some of plain, liger, trl, trl_lean, trl_best; found 'unsloth'" in capsys.readouterr().err


def test_a_missing_trl_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "installed", lambda: None)
    with pytest.raises(ValueError, match="trl is not installed"):
        command.plan_of(command.parser().parse_args([f"--output={tmp_path}"]))


def test_liger_is_asked_for_by_name_and_needs_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "liger" not in command.parser().parse_args([]).peers
    monkeypatch.setattr(liger_side, "installed", lambda: False)
    with pytest.raises(ValueError, match="pip install liger-kernel triton"):
        command.plan_of(command.parser().parse_args(["--peers=liger", f"--output={tmp_path}"]))


def test_pairs_are_drawn_alike_and_kept(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(9)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Path(pairs_file(str(tmp_path / "all.jsonl"), tmp_path, source="files", count=5))
    kept = [json.loads(line) for line in made.read_text().splitlines()]
    assert len(kept) == len({row["prompt"] for row in kept}) == 5
    assert all(row in rows for row in kept)
    with pytest.raises(ValueError, match=r"expected at least 10 pairs \(--pairs\).*found 9"):
        pairs_file(str(tmp_path / "all.jsonl"), tmp_path, source="files", count=10)
