"""The command that measures reference points, on the toy world's reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halos.commands.reference_points import reference_points
from tests.commands.test_evaluate import ITSELF, SMALL, compose


@pytest.mark.long
def test_a_policy_that_is_its_reference_has_no_kl_and_no_reference_point(tmp_path: Path) -> None:
    words = (*ITSELF[:2], *SMALL, f"output={tmp_path}", "split=val", "size=4", "samples=1", "steps=6", "batch_size=4")
    result = reference_points(compose("reference_points", *words))
    assert result == json.loads((tmp_path / "reference_points.json").read_text())
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".md", ".png", ".svg"}
    assert result["kl"]["value"] == 0
    assert [point["name"] for point in result["points"]] == [
        "mismatched",
        "zero",
        "running",
        "per_prompt",
        "token",
        "policy",
    ]
    assert all(point["z0"] == pytest.approx(0, abs=1e-5) for point in result["points"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (ITSELF[:1], "reference: expected a model, found none"),
        (ITSELF[:2], "output: expected a folder for the results"),
        ((*ITSELF, "samples=0"), "samples: expected a whole number from 1 on"),
        ((*ITSELF, "steps=0"), "steps: expected a whole number from 1 on"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_loaded(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        reference_points(compose("reference_points", *words))
