"""The configuration of a finished run as plain values."""

from __future__ import annotations

from pathlib import Path

import pytest

from halos.config.run_config import flat_keys, read_run_config


def test_sections_are_plain_values_with_interpolations_resolved(tmp_path: Path) -> None:
    text = "seed: 3\nloss: {name: kto, betas: [1, 2]}\ndata: {seed: '${seed}'}\nmodel: {path: x}\n"
    (tmp_path / "config.yaml").write_text(text)
    config = read_run_config(tmp_path)
    assert (config.loss, config.data, config.model) == ({"name": "kto", "betas": [1, 2]}, {"seed": 3}, {"path": "x"})
    assert {type(node) for node in (config.loss, config.data, config.everything)} == {dict}
    assert type(config.loss["betas"]) is list
    assert config.seed == config.everything["seed"] == 3


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "loss: {}\ndata: {}\n"])
def test_other_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml: expected a run's configuration"):
        read_run_config(tmp_path)


def test_nested_keys_become_flat_ones() -> None:
    nested = {"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": None, "empty": {}, 1: "x"}
    assert flat_keys(nested) == {"a.b.c": 1, "a.d": [1, {"e": 2}], "f": None, "1": "x"}  # type: ignore[arg-type]
