"""How many validations sample, by counted tokens."""

from __future__ import annotations

from typing import Any

import pytest

from halos.sampling.budget import sampling_plan, validation_cost


def test_the_cost_of_a_validation_by_hand() -> None:
    # Prompts of 30 tokens together, two replies of 4 on average and of 6 at most.
    assert validation_cost([10, 20], [2, 6], kl=False) == 30 + 8 + 32 * 6
    assert validation_cost([10, 20], [2, 6], kl=True) == 3 * (30 + 8) + 32 * 6


def plan(validations: list[int], number: Any = "auto", **numbers: Any) -> Any:
    return sampling_plan(
        validations, number, **{"cost": 30.0, "trained_tokens": 100, "prompts": 8, "kl": True, **numbers}
    )


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [(100, (40,)), (299, (0, 40)), (300, (0, 20, 40)), (400, (0, 10, 30, 40)), (9999, (0, 10, 20, 30, 40))],
)
def test_as_many_validations_sample_as_a_tenth_of_the_run_pays(tokens: int, steps: tuple[int, ...]) -> None:
    found = plan([0, 10, 20, 30, 40], trained_tokens=tokens)
    assert found.steps == steps
    assert found.share == pytest.approx(len(steps) * 30 / (3 * tokens))
    assert found.share <= 0.1 or len(steps) == 1
    assert (found.validations, found.prompts, found.kl) == (5, 8, True)


def test_a_number_is_kept_up_to_that_of_the_validations() -> None:
    assert plan([0, 10, 20], 2).steps == (0, 20)
    assert plan([0, 10, 20], 99).steps == (0, 10, 20)
    assert plan([], 2) == plan([])
    assert (plan([]).steps, plan([]).validations) == ((), 0)
