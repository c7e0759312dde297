"""A source of a user's own, as docs/extend/source.md has it: one class, named on the command line."""

import re
from pathlib import Path

import hydra
import pytest

from halos.commands.inspect_data import inspect_data
from halos.config.shorthand import implied_groups, own_source
from tests.configs import CONF
from tests.data.sources.test_base import write

PAGE = (Path(__file__).parents[2] / "docs/extend/source.md").read_text(encoding="utf-8")


def test_the_class_of_the_page_reads_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(import halos\n.*?)```", PAGE, re.DOTALL)
    (tmp_path / "survey_source.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    answers = (("a", 5), ("b", 1), (None, 3))
    file = write(tmp_path / "s.jsonl", *({"question": "q", "answer": text, "stars": stars} for text, stars in answers))
    with file.open("a") as stream:
        stream.write("{broken")
    words = ["data.source._target_=survey_source.Survey", f"data.train={file}", "data.bad_rows=skip"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("inspect", [*own_source(words), *words, f"cache_dir={tmp_path / 'cache'}"])
    intake = inspect_data(cfg)
    records = list(intake.records["train"])
    assert [record.completions[0].desirable for record in records] == [True, False]
    assert intake.reports["train"]["unanswered"] == intake.reports["train"]["filtered: malformed rows"] == 1


@pytest.mark.parametrize(
    ("words", "implied", "own"),
    [
        (["data.train=f.csv"], ["data=files"], []),
        (["data.train=f.csv", "data=hh"], [], []),
        (["data.train=f.csv", "data.source._target_=x.Y"], [], ["data=file_source"]),
        (["data.train=f.csv", "data.source._target_=x.Y", "data=hh"], [], []),
        (["data.source._target_=x.Y", "experiment=z"], [], []),
    ],
)
def test_the_group_that_words_imply(words: list[str], implied: list[str], own: list[str]) -> None:
    assert (implied_groups(words), own_source(words)) == (implied, own)
