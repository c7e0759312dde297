"""A profile of a small run."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import profiles, roofline
from benchmarks.inputs import synthetic_model, synthetic_pairs
from benchmarks.job import Job
from benchmarks.profiles import PASSES, marked, profile
from benchmarks.saved import saved


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("inputs")
    model = synthetic_model(folder, hidden=16, layers=3, vocabulary=32)
    data = synthetic_pairs(folder, count=4, prompt=6, completion=4, vocabulary=32)
    return Job(kind="profile", model=model, data=data, batch_size=4, max_length=16, max_prompt_length=None)


def test_stages_end_with_their_function() -> None:
    stages = ["rest"]
    inner = marked(stages, "head", lambda: list(stages))
    assert marked(stages, "forward", inner)() == ["rest", "forward", "head"]
    with pytest.raises(ZeroDivisionError):
        marked(stages, "forward", lambda: 1 // 0)()
    assert stages == ["rest"]


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")  # it is overridden, to mark its stage
def test_every_batch_is_measured_as_often_and_every_cause_is_found(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "SECONDS", 0.0)
    monkeypatch.setattr(roofline, "LARGE", 2**10)
    monkeypatch.setattr(profiles, "PASSES", PASSES[:3])
    found = profile(job, tmp_path)
    assert found["layers"] == 3
    assert set(found["seconds"]) == {"first", "measured", "again"}
    optimizer = found["causes"]["optimizer and clipping"]
    assert {"products", "attention", "reductions of the head", "pieces of attention"} <= set(found["causes"])
    assert 0 < optimizer["seconds"] < found["seconds"]["measured"]
    assert set(found["between"]) == {"forward", "attention", "head", "backward", "optimizer", "rest"}
    assert set(found["roofline"]["least"]) == set(found["causes"])
    operations = sum(cost["seconds"] for cost in found["causes"].values())
    assert operations + sum(found["between"].values()) < found["seconds"]["measured"]


def test_what_is_kept_for_the_backward_pass_is_counted(job: Job, tmp_path: Path) -> None:
    found, single = saved(job, tmp_path / "two"), saved(replace(job, batch_size=8), tmp_path / "one")
    embedding, layer, norm = 32 * 16, 4 * 16 * 16 + 3 * 16 * 42 + 2 * 16, 16
    assert found["state_mb"] == pytest.approx(16 * (embedding + 3 * layer + norm) / 2**20)
    assert single["state_mb"] == found["state_mb"] / 2  # the moments come after the only step
    # Two steps of four rows: 8 prompts or fewer of 6 tokens, 8 completions of 3 fed ones. Each layer keeps at least
    # its two inputs of norms and the two of SwiGLU.
    tokens = found["saved_mb"] * 2**20 / 4 / (3 * (2 * 16 + 2 * 42))
    assert 12 < tokens < 400
