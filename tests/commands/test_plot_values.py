"""Words on the command line → picture and verdicts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from halos.commands.plot_values import run


def test_verdicts_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["loss=dpo,sft", f"output={tmp_path}/values.png"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "dpo: HALO, with reward log π_θ/π_ref"
    assert said[1].startswith("sft: not a HALO: the loss is not a function of π_θ/π_ref")
    assert (tmp_path / "values.png").exists()


@pytest.mark.parametrize("word", ["losses=kto", "kto", "=kto"])
def test_an_unknown_word_is_refused(word: str) -> None:
    message = f"expected loss=NAME,NAME,…, loss.KEY=VALUE for all of these, and output=FILE; found {word}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run([word])


def test_a_formula_is_drawn_as_a_loss_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["loss=halo", "loss.value='-(u - 5)**2'", "loss.view=pairs", f"output={tmp_path}/values.png"])
    verdict = "halo: not a HALO: desirable completions: the value decreases at a gain of 5.25"
    assert capsys.readouterr().out.splitlines()[0] == verdict
