"""Wrong arguments are reported as such, and errors inside the call are not mistaken for them."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
from omegaconf import OmegaConf

from halos.config.nodes import build
from halos.config.signatures import accepted_names, check_arguments
from halos.objectives import DPO, Mix, Objective, RobustDPO


class Broken(DPO):
    """A loss whose constructor has a fault of its own."""

    def __init__(self, backbone: Any = None, *, margin: float = 1.0, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.margin = margin + len(3)  # type: ignore[arg-type]


def open_to_all(first: int, **others: int) -> None:
    """Takes any keyword."""


def test_a_constructor_takes_the_keywords_of_its_bases() -> None:
    assert accepted_names(Broken) == [
        *("backbone", "margin", "beta", "label_smoothing", "length_normalised", "tail_weight", "length_penalty"),
        *("margin_weight", "policy_weights", "optim", "seed", "humanline", "non_finite"),
    ]
    assert accepted_names(open_to_all) is None
    assert accepted_names(str) is None


@pytest.mark.parametrize(
    ("function", "arguments", "error"),
    [
        (
            partial(RobustDPO, bta=1),  # type: ignore[call-arg]
            {},
            "x does not take 'bta' (did you mean beta?); expected some of beta, label_smoothing, optim, seed, "
            "humanline, non_finite",
        ),
        (DPO, {"bta": 1, "depth": 2}, "x does not take 'bta' (did you mean beta?), 'depth'; "),
        (Mix, {}, "x does not take these parameters: missing a required argument: 'parts'"),
        (DPO, {"backbone": 1}, "x does not take these parameters: multiple values for argument 'backbone'"),
        (partial(open_to_all, 1), {}, "x does not take these parameters: too many positional arguments"),
    ],
)
def test_a_wrong_argument_is_named(function: Any, arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(error)}"):
        check_arguments("x", function, None, **arguments)


def test_right_arguments_pass() -> None:
    check_arguments("x", partial(open_to_all, 1), second=2)
    check_arguments("x", str, 3)
    check_arguments("x", Broken, None, margin=2.0, beta=0.3, seed=1)


def test_a_fault_inside_a_constructor_keeps_its_traceback() -> None:
    node = OmegaConf.create({"_target_": "tests.config.test_signatures.Broken", "margin": 2.0})
    with pytest.raises(TypeError, match=r"object of type 'int' has no len\(\)") as caught:
        build(node, None)
    assert caught.traceback[-1].name == "__init__"
    with pytest.raises(TypeError, match=r"object of type 'int' has no len\(\)"):
        Mix(parts={"broken": Broken}, weights={"broken": 1.0})


def test_a_wrong_key_of_a_node_is_named() -> None:
    node = OmegaConf.create({"_target_": "halos.objectives.KTO", "beta": 0.1, "desirable_wieght": 2})
    error = r"^halos\.objectives\.KTO does not take 'desirable_wieght' \(did you mean desirable_weight or undesirable_"
    with pytest.raises(ValueError, match=error):
        build(node, None)
    assert isinstance(build(OmegaConf.create({"_target_": "halos.objectives.KTO"}), None), Objective)
