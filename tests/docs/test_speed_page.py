"""The tables of the page on speed, from files of runs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.job import Job
from scripts.pages import speed
from tests.benchmarks.test_profile_table import RESULT
from tests.benchmarks.test_sections import result


def write(folder: Path, name: str, *runs: tuple[Job, dict[str, Any]]) -> None:
    records = [{"job": asdict(job), "result": found} for job, found in runs]
    (folder / name).write_text(json.dumps({"machine": "m", "runs": records}))


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "speed.md"
    monkeypatch.setattr(speed, "SPEED_PAGE", file)
    monkeypatch.setattr(speed, "RUNS", tmp_path)
    write(tmp_path, "a.json", (Job(), result(2.0, 1024)), (Job(who="trl"), result(6.0, 1024)))
    profiles = [(Job(kind="profile", threads=n), RESULT | {"threads": n}) for n in (1, 2)]
    write(tmp_path, "b.json", *profiles)
    return file


def block(name: str, text: str = "old") -> str:
    return f"<!-- from benchmarks/results/speed: {name} -->\n\n{text}\n\n<!-- end -->\n"


def test_blocks_are_written_anew_from_all_files_and_the_text_stays(page: Path) -> None:
    empty = block("memory", "").replace("\n\n\n\n", "\n\n")
    page.write_text(f"before\n{block('comparison')}between old\n{empty}after it\n{block('profiles')}")
    text = speed.speed_page()
    assert text.startswith("before\n<!-- from")
    assert "between old" in text
    assert "after it" in text
    assert text.count("old") == 1
    assert "| kto | 32-true | TRL | 1.07 | 3 × |" in text  # 64 examples in 60 CPU seconds
    assert "losses differ by" not in text
    assert text.index("**KTO, 32-true, one thread**") < text.index("**KTO, 32-true, 2 threads**")
    page.write_text(text)
    assert speed.speed_page() == text


def test_a_block_that_no_table_fills_is_refused(page: Path) -> None:
    page.write_text(block("curves"))
    with pytest.raises(ValueError, match=r"speed.md: expected a block of comparison, memory, profiles, found curves"):
        speed.speed_page()
