"""Where the YAML files of the configuration are."""

from __future__ import annotations

from pathlib import Path


def config_folder() -> str:
    """Return the ``conf`` folder: inside an installed package, next to the package in a checkout."""
    # A wheel carries conf/ inside the package; an editable install reads the one of the checkout.
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def options_of(group: str) -> list[str]:
    """Return the names that ``group=NAME`` may have, sorted; empty if there is no such group."""
    return sorted(file.stem for file in (Path(config_folder()) / group).glob("*.yaml"))
