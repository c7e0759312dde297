"""Names on the command line → objectives."""

from __future__ import annotations

import pytest

from halos.objectives import KTO
from halos.testing import suite
from halos.testing.suite import find_objective


def test_a_dotted_path_names_a_class() -> None:
    assert find_objective("halos.objectives.KTO") is KTO


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("halos.objectives.Missing", "No halos.objectives attribute Missing"),
        ("halos.nowhere.Hinge", "No module named 'halos.nowhere'"),
        ("halos.objectives.kto_loss", "expected a subclass of halos.objectives.Objective"),
        ("Hinge", "--halos-objective Hinge"),
    ],
)
def test_a_path_to_nothing_is_said_so(path: str, message: str) -> None:
    with pytest.raises(pytest.UsageError, match=message):
        find_objective(path)


def test_a_promise_that_is_not_made_is_skipped() -> None:
    with pytest.raises(pytest.skip.Exception, match="has no reference"):
        suite.test_conformance("halos.objectives.SFT", "frozen reference")


def test_a_broken_promise_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"^WrongSign, signs: log π of desirable completions"):
        suite.test_conformance("tests.testing.broken.WrongSign", "signs")
