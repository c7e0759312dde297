"""The configuration of a finished run as plain values."""

from __future__ import annotations

from pathlib import Path

import pytest

from halos.config.nodes import plain
from halos.config.runs import run_config


def test_sections_are_plain_values_with_interpolations_resolved(tmp_path: Path) -> None:
    text = "seed: 3\nloss: {name: kto, betas: [1, 2]}\ndata: {seed: '${seed}'}\nmodel: {path: x}\n"
    (tmp_path / "config.yaml").write_text(text)
    config = plain(run_config(tmp_path))
    assert config == {"seed": 3, "loss": {"name": "kto", "betas": [1, 2]}, "data": {"seed": 3}, "model": {"path": "x"}}
    assert {type(node) for node in (config, config["loss"], config["data"])} == {dict}
    assert type(config["loss"]["betas"]) is list


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "loss: {}\ndata: {}\n"])
def test_other_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml: expected a run's configuration"):
        run_config(tmp_path)
