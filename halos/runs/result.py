"""One number of a finished run, for a sweep that looks for the best settings."""

from __future__ import annotations

import json
from pathlib import Path


def result(folder: Path, name: str) -> float:
    """``val/…`` or ``samples/…`` of the run's summary.

    Raises ``ValueError`` if the run has no such number.
    """
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    stages = {"val": summary.get("metrics", {}), "samples": summary.get("samples", {})}
    numbers = {f"{stage}/{key}": value for stage, found in stages.items() for key, value in found.items()}
    if not isinstance(numbers.get(name), int | float):
        raise ValueError(f"sweep_metric: expected one of {', '.join(sorted(numbers))}; found {name!r}")
    return float(numbers[name])
