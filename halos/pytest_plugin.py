"""The pytest option ``--halos-objective mylab.losses.MyLoss`` checks an objective with the conformance kit."""

import sys
from pathlib import Path

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
        # As for `python -m`: losses are imported from the current folder.
        sys.path.insert(0, str(config.invocation_params.dir))
        # Alone, the option runs these checks only, and not the project's own tests. Paths that are named run too.
        paths = config.args if config.args_source is pytest.Config.ArgsSource.ARGS else []
        config.args = [*paths, str(SUITE)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "halos_objective" not in metafunc.fixturenames:
        return
    # Imports torch, which every pytest run in this environment would wait for at the top of the file.
    from halos.testing import PROPERTIES
    from halos.testing.suite import find_objective

    objectives = metafunc.config.getoption("--halos-objective")
    try:
        for objective in objectives:
            find_objective(objective)
    except pytest.UsageError as error:
        # Here it is one error of one line, and in the tests it would be one of each property.
        raise pytest.Collector.CollectError(str(error)) from None
    metafunc.parametrize("halos_property", PROPERTIES)
    metafunc.parametrize("halos_objective", objectives)
