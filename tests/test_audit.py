"""``make audit`` fails where it has not checked anything."""

import json
import subprocess
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
