"""Each part of the check has a process and a time limit of its own, and the next one goes on whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halos.gpu_check import runs
from halos.gpu_check.part import Numbers, Part, Setting, Skipped
from halos.gpu_check.parts import PARTS
from halos.gpu_check.report import as_json, as_markdown
from halos.gpu_check.run import Outcome, run_parts


def passes(setting: Setting) -> Numbers:
    return {"answer": 42.0, "where": setting.device}


def raises(setting: Setting) -> Numbers:
    raise ArithmeticError("two and | two\nare five")


def skips(setting: Setting) -> Numbers:
    raise Skipped("nothing to do")


def dies(setting: Setting) -> Numbers:
    os._exit(7)


def hangs(setting: Setting) -> Numbers:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    (setting.folder / "child").write_text(str(child.pid))
    time.sleep(100)
    return {}


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_parts_end_in_every_way_and_the_others_go_on(tmp_path: Path) -> None:
    setting = Setting(device="cpu", devices=1, model=None, folder=tmp_path)
    checks = (raises, dies, skips, passes, hangs, passes)
    parts = [Part(name=check.__name__, check=check, limit=30, look_at="here") for check in checks]
    parts[4] = Part(name="hangs", check=hangs, limit=2, look_at="here")
    first, second, third, fourth, fifth, sixth = run_parts(parts, setting, limit=100)
    assert (first.state, first.reason) == ("failed", "ArithmeticError: two and | two\nare five")
    assert first.trace.endswith("are five\n")
    assert (second.state, second.reason) == ("failed", "its process ended with exit code 7")
    assert (third.state, third.reason) == ("skipped", "nothing to do")
    assert (fourth.state, fourth.numbers) == ("passed", {"answer": 42.0, "where": "cpu"})
    assert (fifth.state, fifth.reason) == ("stopped", "it had not ended after 6 s")  # a CPU gets three times as long
    assert fifth.seconds >= 6
    assert sixth.state == "passed"
    assert not is_running(int((tmp_path / "child").read_text()))


def test_parts_that_do_not_fit_into_the_time_are_skipped(tmp_path: Path) -> None:
    setting = Setting(device="cpu", devices=1, model=None, folder=tmp_path)
    (only,) = run_parts([Part(name="late", check=passes, limit=1, look_at="")], setting, limit=0)
    assert (only.state, only.reason) == ("skipped", "the time limit of 0 s for all parts is over; set minutes to more")


@pytest.mark.long
def test_a_part_that_the_time_for_all_cuts_short_is_skipped_and_not_wrong(tmp_path: Path) -> None:
    setting = Setting(device="cpu", devices=1, model=None, folder=tmp_path)
    (only,) = run_parts([Part(name="late", check=hangs, limit=50, look_at="")], setting, limit=2)
    assert (only.state, only.wrong) == ("skipped", False)
    assert only.reason == "the time limit of 2 s for all parts is over; set minutes to more"


def test_the_report_says_what_was_found_and_where_to_look() -> None:
    outcomes = [
        Outcome(
            name="good",
            about="It works.",
            state="passed",
            seconds=1.25,
            numbers={"error": 1.234e-5, "devices": 2, "rate": 8574.2, "how": "well"},
        ),
        Outcome(name="bad", state="failed", reason="a | b\nc", look_at="the cable", trace="one\ntwo\n"),
        Outcome(name="none", state="skipped", reason="no GPU"),
    ]
    text = as_markdown(outcomes, {"torch": "2.13"})
    assert text == (
        "# Check of the devices\n\n1 passed, 1 failed, 0 stopped, 1 skipped, in 1 s.\n\n"
        "| part | checks | state | seconds | measured, or why not |\n|---|---|---|---|---|\n"
        "| good | It works. | passed | 1.2 | error: 1.23e-05; devices: 2; rate: 8,574; how: well |\n"
        "| bad |  | failed | 0.0 | a \\| b c |\n| none |  | skipped | 0.0 | no GPU |\n\n"
        "## bad\n\na \\| b c\n\nLook at: the cable.\n\n```\none\ntwo\n```\n\n## Machine\n\n- torch: 2.13\n"
    )
    report = json.loads(as_json(outcomes, {"torch": "2.13"}))
    assert report["machine"] == {"torch": "2.13"}
    assert [part["state"] for part in report["parts"]] == ["passed", "failed", "skipped"]


def test_a_run_on_several_devices_has_as_many_examples_a_step_as_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = {}

    def step_size(
        setting: Setting, name: str, *words: str, devices: int = 1, readers: int | None = None
    ) -> list[float]:
        run = runs.command(setting, name, *words, devices=devices, readers=readers)
        (size,) = [int(word.partition("=")[2]) for word in run if word.startswith("data.batch_size=")]
        # Devices of a tensor-parallel group read the same data.
        examples[name] = size * devices // (2 if "strategy=fsdp_tp" in words else 1)
        return [1.0]

    monkeypatch.setattr(runs, "losses", step_size)
    for check in (runs.ddp, runs.fsdp, runs.hsdp, runs.offload, runs.tensor_parallel):
        check(Setting(device="cpu", devices=1, model=None, folder=tmp_path))
    assert len(examples) == 6
    assert set(examples.values()) == {runs.BATCH}


def test_every_part_says_what_it_checks() -> None:
    assert all(part.about.endswith(".") for part in PARTS)


def test_parts_have_names_for_a_command_line_and_all_fit() -> None:
    assert all(part.name.isidentifier() for part in PARTS)
    assert len({part.name for part in PARTS}) == len(PARTS)
