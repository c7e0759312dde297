"""Words on the command line → picture and verdicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from halos.theory.command import run


def test_verdicts_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["loss=dpo,sft", f"output={tmp_path}/values.png"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "dpo: HALO, with reward log π_θ/π_ref"
    assert said[1].startswith("sft: no HALO: the loss is no function of π_θ/π_ref")
    assert (tmp_path / "values.png").exists()


@pytest.mark.parametrize("word", ["losses=kto", "kto", "=kto"])
def test_an_unknown_word_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="expected loss=NAME,NAME,… and output=FILE; found"):
        run([word])
