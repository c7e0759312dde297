"""``pytest --halos-objective mylab.losses.MyLoss``: the conformance kit on an objective from anywhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

SUITE = Path(__file__).parent / "testing" / "suite.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("halos").addoption(
        "--halos-objective",
        action="append",
        default=[],
        metavar="PACKAGE.MODULE.CLASS",
        help="check this objective with the conformance kit of halos (may be repeated)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--halos-objective"):
        sys.path.insert(0, str(config.invocation_params.dir))
        # Alone, the option means these checks only; with paths, these checks too.
        named = config.args if config.args_source is pytest.Config.ArgsSource.ARGS else []
        config.args = [*named, str(SUITE)]


def pytest_generate_tests(metafunc: Any) -> None:
    if "halos_objective" not in metafunc.fixturenames:
        return
    from halos.testing import PROPERTIES  # heavy imports, for those who asked

    metafunc.parametrize("halos_property", PROPERTIES)
    metafunc.parametrize("halos_objective", metafunc.config.getoption("--halos-objective"))
