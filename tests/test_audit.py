"""``make audit`` fails where it has not checked anything."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts import audit

SAFE = {"name": "a", "version": "1", "vulns": []}
AFFECTED = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1"}]}
SKIPPED = {"name": "c", "skip_reason": "not on PyPI"}


@pytest.mark.parametrize(
    ("answer", "status", "line"),
    [
        ({"dependencies": [SAFE]}, 0, "1 packages: 0 with known vulnerabilities, 0 not checked"),
        ({"dependencies": [SAFE, AFFECTED]}, 1, "b 2: PYSEC-1"),
        ({"dependencies": [SAFE, SKIPPED]}, 2, "not checked, which is no pass: 1 packages; the first: not on PyPI"),
        ({"dependencies": []}, 2, "not checked, which is no pass: no packages"),
        (None, 2, "not checked, which is no pass: ERROR: no connection"),
    ],
)
def test_only_what_was_checked_passes(
    answer: Any, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        out = "" if answer is None else json.dumps(answer)
        return subprocess.CompletedProcess(command, 1, out, "warning\nERROR: no connection\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert audit.main() == status
    assert line in "".join(capsys.readouterr())


def test_each_exception_from_the_rules_of_security_has_a_reason() -> None:
    root = Path(audit.__file__).parents[1]
    lines = [
        f"{file.relative_to(root)}:{number}: {line.strip()}"
        for folder in ("halos", "scripts")
        for file in root.joinpath(folder).rglob("*.py")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(r"noqa: (S\d|TID251)", line)
    ]
    assert len(lines) > 5
    assert [line for line in lines if not re.search(r"noqa: [A-Z0-9, ]+ +\(.+\)", line)] == []
