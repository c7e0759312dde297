"""Nested nodes as flat keys, and the classes that nodes name."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from halos.config.nodes import build, class_of, flatten


def test_keys_are_joined_by_dots_and_no_leaf_is_lost() -> None:
    node = {"loss": {"beta": 0.1, "parts": {}}, "seed": 0, "sizes": [1, {"a": 2}], 3: {"x": None}}
    assert flatten(node) == {
        "loss.beta": 0.1,
        "loss.parts": {},
        "seed": 0,
        "sizes": [1, {"a": 2}],
        "3.x": None,
    }
    assert flatten({"beta": 1}, "loss") == {"loss.beta": 1}
    assert flatten(2, "loss") == {"loss": 2}


def test_the_error_of_a_module_that_is_nowhere_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"^loss\._target_: prospect\.Loss could not be imported: .*prospect"
    ) as caught:
        class_of("loss", "prospect.Loss", object)
    assert str(caught.value).endswith(
        f"; prospect was looked for in {tmp_path}, in PYTHONPATH and among installed packages"
    )
    with pytest.raises(ValueError, match="could not be imported") as caught:
        class_of("loss", "halos.objectives.KTOO", object)
    assert "looked for" not in str(caught.value)
    node = OmegaConf.create({"_target_": "builtins.dict", "source": {"_target_": "prospect.Source"}})
    with pytest.raises(ValueError, match=rf"'prospect'.*; prospect was looked for in {tmp_path}"):
        build(node)
