"""Parameters are checked when an objective is built, and errors name the key of the configuration."""

import math
import re
from typing import Any

import pytest

from halos.config.parameters import require_between, require_positive, require_weight
from halos.objectives import DPO, KTO, PPO, Objective


@pytest.mark.parametrize(
    ("objective", "key", "value"),
    [
        (KTO, "beta", 0),
        (KTO, "beta", -0.1),
        (KTO, "beta", math.nan),
        (KTO, "beta", math.inf),
        (KTO, "beta", "0.1"),
        (KTO, "beta", 10**400),
        (KTO, "beta", True),
        (KTO, "beta", None),
        (KTO, "desirable_weight", -1),
        (KTO, "undesirable_weight", "automatic"),
        (DPO, "beta", 0.0),
        (DPO, "label_smoothing", -0.01),
        (DPO, "label_smoothing", 0.5),
        (PPO, "beta", -1),
        (PPO, "clip_range", 0),
        (PPO, "clip_range", 1),
        (PPO, "gamma", 1.01),
        (PPO, "gamma", -0.01),
        (PPO, "gamma", True),
        (PPO, "gamma", "1"),
        (PPO, "lam", 1.01),
        (PPO, "lam", -0.01),
        (PPO, "critic_coefficient", -1),
        (PPO, "critic_clip", 0),
    ],
)
def test_values_that_make_no_sense_name_their_key(objective: type[Objective], key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^loss\.{key}: expected a number in .*, found {re.escape(repr(value))}$"):
        objective(**{key: value})


@pytest.mark.parametrize(
    ("objective", "key", "value"),
    [
        (KTO, "desirable_weight", 0),
        (KTO, "undesirable_weight", "auto"),
        (DPO, "label_smoothing", 0.49),
        (PPO, "beta", 0),
        (PPO, "clip_range", 0.99),
        (PPO, "gamma", 1),
        (PPO, "lam", 0),
        (PPO, "lam", 1.0),
        (PPO, "critic_coefficient", 0),
    ],
)
def test_the_ends_of_the_ranges(objective: type[Objective], key: str, value: Any) -> None:
    assert getattr(objective(**{key: value}), key) == value


def test_numbers_become_floats() -> None:
    assert isinstance(require_positive("beta", 1), float)
    assert isinstance(require_weight("desirable_weight", 2), float)
    assert isinstance(require_between("gamma", 0, 0, 1), float)


def test_open_and_closed_ends() -> None:
    assert require_between("x", 0.0, 0.0, 1.0) == 0.0
    with pytest.raises(ValueError, match=r"^loss\.x: expected a number in \(0, 1\), found 0\.0$"):
        require_between("x", 0.0, 0.0, 1.0, open_low=True)
    with pytest.raises(ValueError, match=r"^loss\.x: expected a number in \[0, 1\), found 1\.0$"):
        require_between("x", 1.0, 0.0, 1.0)
