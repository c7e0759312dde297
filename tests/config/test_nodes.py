"""Nested nodes as flat keys."""

from halos.config.nodes import flatten


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
