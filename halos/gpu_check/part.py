"""A part of the check: what it is called with, what it returns, and how it says that it does not apply."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

Numbers = Mapping[str, float | str]
"""What a part has measured, by names that are read in the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and on what the parts run.

    Attributes:
        device: ``cuda`` or ``cpu``.
        devices: how many of them may be used.
        model: a model's folder, hub id or GGUF file; None: a small random one that is made here.
        folder: for runs and caches.
    """

    device: str
    devices: int
    model: str | None
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def patience(self) -> float:
        """By how much the parts' time limits are multiplied: a CPU may take longer, most of all to compile."""
        return 1.0 if self.on_gpu else 3.0


class Skipped(Exception):
    """A part does not apply to this machine, for the reason that the message says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the check.

    Attributes:
        name: in the report.
        check: does the work. It returns what it measured, and raises :class:`Skipped`, or any error if something is
            wrong.
        limit: seconds on a GPU after which it is stopped.
        look_at: what to read or try where it fails.
    """

    name: str
    check: Callable[[Setting], Numbers]
    limit: float
    look_at: str

    @property
    def about(self) -> str:
        """What it checks: the first line of the check's docstring."""
        check = self.check.func if isinstance(self.check, partial) else self.check
        return (check.__doc__ or "").partition("\n")[0]


def expect(condition: bool, expected: str, found: object) -> None:
    """Raise ``ValueError`` unless the condition holds."""
    if not condition:
        raise ValueError(f"expected {expected}, found {found}")


def need_gpu(setting: Setting, why: str) -> None:
    """Raise :class:`Skipped` on a CPU."""
    if not setting.on_gpu:
        raise Skipped(f"{why}; there is no CUDA device")


def need_package(package: str, extra: str) -> None:
    """Raise :class:`Skipped` where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Skipped(f"{package} is not installed: pip install 'halos[{extra}]'")
