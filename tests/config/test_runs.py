"""The configuration of a finished run as plain values."""

from __future__ import annotations

from pathlib import Path

import pytest

from halos.config.runs import read_run, run_config, saved_run


def test_sections_are_plain_values(tmp_path: Path) -> None:
    text = "seed: 3\nloss: {name: kto, betas: [1, 2]}\ndata: {seed: 3}\nmodel: {path: x}\n"
    (tmp_path / "config.yaml").write_text(text)
    config = saved_run(tmp_path)
    assert config == {"seed": 3, "loss": {"name": "kto", "betas": [1, 2]}, "data": {"seed": 3}, "model": {"path": "x"}}
    assert {type(node) for node in (config, config["loss"], config["data"])} == {dict}
    assert type(config["loss"]["betas"]) is list


@pytest.mark.parametrize("line", ["seed: [1]", "seed: x", "seed: .inf"])
def test_a_run_has_numbers_where_they_are_read(line: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"{line}\nloss: {{parts: 3}}\ndata: {{}}\nmodel: {{}}\n")
    with pytest.raises(ValueError, match="expected numbers as beta and seed"):
        read_run(tmp_path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "loss: {}\ndata: {}\n", "loss: 3\ndata: {}\nmodel: {}"])
def test_other_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml: expected a run's configuration"):
        run_config(tmp_path)


def test_the_adapter_of_a_run_has_keys(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("loss: {}\ndata: {}\nmodel: {lora: [path]}\n")
    with pytest.raises(ValueError, match=r"config.yaml: expected keys and values in model.lora, found \['path'\]"):
        run_config(tmp_path)
