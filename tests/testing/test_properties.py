"""The built-in objectives keep every promise, and each planted fault is caught by the property that names it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from halos.commands.builders import objective_maker
from halos.objectives import DPO, KTO, PPO, SFT, Needs, Objective
from halos.testing import PROPERTIES, NotApplicable, Violation, check_objective, check_property
from tests.configs import compose, options
from tests.testing.broken import (
    FAULTS,
    LossAsANumber,
    LossOfEachExample,
    MeanOverPadding,
    NoDenominator,
    NothingToTrain,
    WrongSign,
)

SOME = ("kto", "sft")
KINDS = ("dpo", "ppo", "bco", "csft", "simpo", "infonca", "aot", "halo", "bradley_terry", "mix")
"""One loss of each other kind; the rest is slow."""


def case(name: str) -> Any:
    slow = name not in (*SOME, *KINDS)
    return pytest.param(name, marks=[pytest.mark.slow] if slow else [] if name in SOME else [pytest.mark.long])


@pytest.mark.parametrize("name", [case(name) for name in options("loss")])
def test_every_objective_conforms(name: str) -> None:
    check_objective(objective_maker(compose(f"loss={name}").loss))


@pytest.mark.parametrize("broken", FAULTS)
def test_each_fault_is_caught_by_the_property_that_names_it(broken: type[Objective]) -> None:
    with pytest.raises(Violation, match=f"^{broken.__name__}, {FAULTS[broken]}: "):
        check_property(broken, FAULTS[broken])


def test_checking_an_objective_ends_at_its_first_fault() -> None:
    with pytest.raises(Violation, match=r"^WrongSign, signs: "):
        check_objective(WrongSign)


def test_every_property_has_a_fault_that_it_catches() -> None:
    # Sharing is a promise of the backbone, not one that an objective can break by itself.
    assert set(FAULTS.values()) == set(PROPERTIES) - {"prompt sharing"}


def test_a_violation_has_both_numbers_and_the_smallest_batch() -> None:
    with pytest.raises(Violation) as caught:
        check_property(MeanOverPadding, "padding")
    first, batch, row = str(caught.value).splitlines()
    assert first.startswith("MeanOverPadding, padding: loss with 3 more columns of padding: expected 0.9197")
    assert ", found 0.5255" in first
    assert batch == "smallest batch that shows it: 1 example(s)"
    assert row.startswith("  example 0: prompt 0 of ")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (NothingToTrain, "expected at least one loss term, found none"),
        (LossOfEachExample, "loss term 'sft': expected a scalar tensor, found tensor"),
        (LossAsANumber, r"loss term 'sft': expected a scalar tensor, found \d"),
        (NoDenominator, "loss term 'sft': expected the count of the whole step, found None"),
    ],
)
def test_a_loss_of_another_shape_is_described(broken: type[Objective], message: str) -> None:
    with pytest.raises(Violation, match=f"shapes: {message}"):
        check_property(broken, "shapes")


def test_an_error_inside_the_loss_is_a_violation_too() -> None:
    class Raises(SFT):
        def compute(self, *_: Any) -> Any:
            raise KeyError("rewards")

    with pytest.raises(Violation, match="Raises, row order: raised KeyError: 'rewards'"):
        check_property(Raises, "row order")


@pytest.mark.parametrize(("kind", "name"), [(SFT, "frozen reference"), (PPO, "accumulation")])
def test_what_is_not_promised_is_not_checked(kind: type[Objective], name: str) -> None:
    with pytest.raises(NotApplicable):
        check_property(kind, name)


def test_an_objective_says_what_it_moves() -> None:
    class Lowers(WrongSign):
        needs = Needs(moves=(-1, 1))

    check_property(Lowers, "signs")

    class Either(WrongSign):
        needs = Needs(moves=(None, None))

    check_property(Either, "signs")

    class Nothing(DPO):
        needs = Needs(moves=(0, 0))

    with pytest.raises(NotApplicable):
        check_property(Nothing, "signs")


def test_an_objective_that_ignores_the_policy_is_caught() -> None:
    class Constant(DPO):
        def compute(self, batch: Any, policy: Any, reference: Any) -> Any:
            policy.tokens = policy.tokens.detach()
            return super().compute(batch, policy, reference)

    with pytest.raises(Violation, match="expected a loss that depends on the policy's log-probs"):
        check_property(Constant, "gradient")


def test_parameters_of_a_partial_are_nudged_from_their_own_values() -> None:
    check_property(partial(DPO, label_smoothing=0.4), "parameters")
    check_property(partial(KTO, desirable_weight=2.0), "parameters")
