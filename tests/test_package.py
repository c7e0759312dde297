"""What the package says of itself, and the workflows that check it."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import halos

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert halos.__version__ == PYPROJECT["project"]["version"] == citation["version"]


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_call_targets_of_the_makefile(workflow: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    commands = [(job, step["run"]) for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands
    for job, command in commands:
        name = re.fullmatch(r"make (\S+)( .*)?", command)
        assert name, f"{command}: a step is a target that can be run on a laptop too"
        matrix = job.get("strategy", {}).get("matrix", {})
        for target in matrix["target"] if name[1].startswith("$") else [name[1]]:
            assert target in targets


def test_the_source_package_has_what_its_readme_and_makefile_name() -> None:
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all((ROOT / name).exists() for name in included)
    assert {"constraints.txt", "Makefile", "SECURITY.md", "CONTRIBUTING.md", "CITATION.cff"} <= set(included)
