"""One test for each objective named on pytest's command line and each property."""

from __future__ import annotations

from importlib import import_module

import pytest

from halos.objectives.base import Objective
from halos.testing import NotApplicable, Violation, check_property


def test_conformance(halos_objective: str, halos_property: str) -> None:
    said = None
    try:
        check_property(find_objective(halos_objective), halos_property)
    except NotApplicable as reason:
        pytest.skip(str(reason))
    except Violation as violation:
        said = str(violation)
    if said is not None:  # outside the handler: pytest would print the violation once more
        pytest.fail(said, pytrace=False)


def find_objective(path: str) -> type[Objective]:
    """The objective's class at a dotted path. Raises ``pytest.UsageError`` if there is none."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise pytest.UsageError(f"--halos-objective {path}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise pytest.UsageError(f"--halos-objective {path}: expected a subclass of halos.objectives.Objective")
    return found
