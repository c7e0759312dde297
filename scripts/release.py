"""Check that this checkout can be released as the version in pyproject.toml: ``make release``.

It looks at the version, the changelog's section, the tag ``vVERSION`` at this commit, uncommitted changes, and the
built wheel and sdist. Nothing is changed or uploaded. Exit status 0: all agree. 1: each line says what to do.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")


def problems(root: Path = ROOT) -> Iterator[str]:
    """Yield what has to be done before the release."""
    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if not VERSION.fullmatch(version):
        yield f"pyproject.toml: expected a version like 0.1.0 or 0.2.0rc1, found {version}"
    yield from _of_changelog((root / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    if changed := _git(root, "status", "--porcelain"):
        yield f"git: expected no uncommitted changes, found {len(changed.splitlines())}; commit them"
    if _git(root, "rev-list", "-n", "1", f"v{version}") != _git(root, "rev-parse", "HEAD"):
        yield f"git: expected the tag v{version} at this commit; git tag v{version}"
    built = {path.name for path in (root / "dist").glob("*")}
    for name in (f"halos-{version}-py3-none-any.whl", f"halos-{version}.tar.gz"):
        if name not in built:
            yield f"dist: expected {name}, found {', '.join(sorted(built)) or 'nothing'}; make wheel"
    if len(built) > 2:
        yield f"dist: expected one wheel and one sdist, found {len(built)} files; make wheel"


def _of_changelog(text: str, version: str) -> Iterator[str]:
    sections: dict[str, str] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        sections[title] = body.strip()
    dated = re.compile(rf"\[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}")
    title = next((title for title in sections if dated.fullmatch(title.strip())), None)
    if title is None:
        yield f"CHANGELOG.md: expected a section '## [{version}] - YYYY-MM-DD'; give it what stands under Unreleased"
    elif not sections[title]:
        yield f"CHANGELOG.md: expected the changes of {version}, found an empty section"
    if sections.get("[Unreleased]"):
        yield "CHANGELOG.md: expected nothing under Unreleased; move it into the section of the version"


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)  # noqa: S603, S607 (fixed words)
    return done.stdout.strip()


def main() -> int:
    """Print what has to be done, and return the exit status."""
    found = list(problems())
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
