"""Files of another user, for tests that are not run by the administrator."""

import os
from pathlib import Path
from typing import Any

import pytest


def as_if_owned_by_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``stat`` give another owner for this path."""
    real = Path.stat

    def stat(self: Path, **options: Any) -> os.stat_result:
        status = real(self, **options)
        if self != path:
            return status
        fields = list(status)
        fields[4] = os.geteuid() + 1
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "stat", stat)
