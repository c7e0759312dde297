"""``halos check-gpu`` without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import hydra
import pytest

from halos.commands.check_gpu import check_gpu
from halos.config.folder import config_folder
from halos.gpu_check.parts import PARTS
from halos.processes.errors import RunFailed


def composed(*words: str) -> object:
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        return hydra.compose("check_gpu", list(words))


@pytest.mark.slow
def test_the_check_runs_to_its_end_on_a_cpu(tmp_path: Path) -> None:
    outcomes = check_gpu(composed("device=cpu", "minutes=60", f"output={tmp_path}"))  # type: ignore[arg-type]
    states = {outcome.name: outcome.state for outcome in outcomes}
    assert list(states) == [part.name for part in PARTS]
    assert set(states.values()) == {"passed", "skipped"}
    assert all(outcome.reason for outcome in outcomes if outcome.state == "skipped")
    assert {"flex", "liger", "qlora", "adamw_8bit", "float16", "vllm"} <= {
        n for n, s in states.items() if s == "skipped"
    }
    assert {"pieces", "waits", "ddp", "fsdp", "resume", "speed_plain"} <= {
        n for n, s in states.items() if s == "passed"
    }
    report = json.loads((tmp_path / "report.json").read_text())
    assert [part["name"] for part in report["parts"]] == list(states)
    assert (tmp_path / "report.md").read_text().startswith("# Check of the devices\n")


def test_unknown_words_are_refused(tmp_path: Path) -> None:
    where = f"output={tmp_path}"
    with pytest.raises(ValueError, match="parts: expected one of pieces, "):
        check_gpu(composed("parts=[wishes]", where))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device: expected one of auto, cpu, cuda; found 'tpu'"):
        check_gpu(composed("device=tpu", where))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device: expected a CUDA device, found none; set device=cpu"):
        check_gpu(composed("device=cuda", where))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="minutes: expected a number from 0 on"):
        check_gpu(composed("minutes=-1", where))  # type: ignore[arg-type]


def test_a_failure_is_an_error_after_the_report_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halos.gpu_check.run import Outcome

    bad = Outcome(name="pieces", state="failed", reason="off by one", look_at="the code")
    monkeypatch.setattr("halos.commands.check_gpu.run_parts", lambda *_, **__: iter([bad]))
    with pytest.raises(RunFailed, match="check-gpu: pieces failed; see "):
        check_gpu(composed("device=cpu", "parts=[pieces]", f"output={tmp_path}"))  # type: ignore[arg-type]
    assert "off by one" in (tmp_path / "report.md").read_text()
