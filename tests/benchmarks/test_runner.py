"""Jobs are measured once, in processes of their own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.job import Job
from benchmarks.runner import Runner


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    job = Job(who="trl", shape=(("hidden", 64), ("layers", 2)), max_prompt_length=None, lr=1e-5)
    job.save(tmp_path / "job")
    assert Job.load(tmp_path / "job") == job


def test_other_measurements_and_other_machines_have_other_names() -> None:
    job = Job(loss="kto")
    names = [job.name("a"), job.name("b"), replace(job, repeat=1).name("a"), replace(job, lr=1.0).name("a")]
    assert len(set(names)) == 4
    assert job.name("a") == Job(loss="kto").name("a")


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, job = Runner(tmp_path), Job()
    name = job.name(f"{made.machine} {made.code}")
    (tmp_path / "results" / f"{name}.json").write_text(json.dumps({"seconds": 3}))
    monkeypatch.setattr("benchmarks.runner.subprocess.run", lambda *_, **__: pytest.fail("it was measured"))
    assert made.run(job) == {"seconds": 3}
    made.keep(tmp_path / "runs.json")
    kept = json.loads((tmp_path / "runs.json").read_text())
    assert kept["machine"] == made.machine
    (run,) = kept["runs"]
    assert (run["result"], run["job"]["loss"]) == ({"seconds": 3}, "kto")
    assert not {"model", "data", "cache"} & set(run["job"])  # paths of this machine


@pytest.mark.slow
def test_a_job_that_fails_is_reported_and_may_be_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Runner(tmp_path, planned=7).run(Job(kind="nonsense")) is None
    assert "[1/7] failed (1)" in (said := capsys.readouterr().err)
    assert "KeyError: 'nonsense'" in said
    assert list((tmp_path / "results").iterdir()) == []
