"""The tests of ``pytest --halos-objective``: one for each named objective and each property."""

from importlib import import_module

import pytest

from halos.config.nodes import looked_for
from halos.objectives.base import Objective
from halos.testing import NotApplicable, Violation, check_property


def test_conformance(halos_objective: str, halos_property: str) -> None:
    problem = None
    try:
        check_property(find_objective(halos_objective), halos_property)
    except NotApplicable as reason:
        pytest.skip(str(reason))
    except Violation as violation:
        problem = str(violation)
    # Within the handler, pytest would print the violation a second time, as the cause of the failure.
    if problem is not None:
        pytest.fail(problem, pytrace=False)


def find_objective(path: str) -> type[Objective]:
    """The objective's class at a dotted path; a ``pytest.UsageError`` if there is none."""
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise pytest.UsageError(f"--halos-objective {path}: {error}{looked_for(path)}") from error
    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        raise pytest.UsageError(f"--halos-objective {path}: expected a subclass of halos.objectives.Objective")
    return cls
