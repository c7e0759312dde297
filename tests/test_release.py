"""The check before a release, on a repository of its own."""

import subprocess
from pathlib import Path

import pytest

from scripts.release import problems

CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-12-01\n\n### Added\n\n- A loss.\n"


def git(root: Path, *words: str) -> None:
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(root), *author, *words], check=True, capture_output=True)


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "halos"\nversion = "0.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (tmp_path / ".gitignore").write_text("dist/\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "All")
    git(tmp_path, "tag", "v0.2.0")
    (tmp_path / "dist").mkdir()
    for name in ("halos-0.2.0-py3-none-any.whl", "halos-0.2.0.tar.gz"):
        (tmp_path / "dist" / name).touch()
    return tmp_path


def test_what_agrees_can_be_released(ready: Path) -> None:
    assert list(problems(ready)) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("## [0.2.0] - 2026-12-01", "## [0.1.9] - 2026-12-01", "CHANGELOG.md: expected a section '## [0.2.0]"),
        ("## [0.2.0] - 2026-12-01", "## [0.2.0]", "CHANGELOG.md: expected a section '## [0.2.0]"),
        ("### Added\n\n- A loss.\n", "", "CHANGELOG.md: expected the changes of 0.2.0, found an empty section"),
        ("## [Unreleased]\n", "## [Unreleased]\n\n- Another.\n", "CHANGELOG.md: expected nothing under Unreleased"),
    ],
)
def test_a_changelog_that_does_not_fit_is_named(ready: Path, old: str, new: str, expected: str) -> None:
    (ready / "CHANGELOG.md").write_text(CHANGELOG.replace(old, new))
    git(ready, "commit", "-qam", "Changelog")
    git(ready, "tag", "-f", "v0.2.0")
    (found,) = problems(ready)
    assert found.startswith(expected)


def test_everything_else_that_does_not_fit_is_named(ready: Path) -> None:
    (ready / "pyproject.toml").write_text('[project]\nname = "halos"\nversion = "next"\n')
    (ready / "dist" / "halos-0.1.0.tar.gz").touch()
    places = [line.partition(":")[0] for line in problems(ready)]
    assert places == ["pyproject.toml", "CHANGELOG.md", "git", "git", "dist", "dist", "dist"]
