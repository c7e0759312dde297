"""What finished runs are worth, for a sweep that looks for the best settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

KL = "samples/kl"


def trial_value(folders: Sequence[Path], name: str, *, max_kl: float | None = None) -> float:
    """The mean of ``name`` over the runs of one trial, less the nats by which their mean ``samples/kl`` lies above
    ``max_kl``: settings that win by leaving the reference, or with one seed alone, are not the best.

    Raises ``ValueError`` as :func:`result` does.
    """
    value = fmean(result(folder, name) for folder in folders)
    if max_kl is None:
        return value
    return value - max(0.0, fmean(result(folder, KL) for folder in folders) - max_kl)


def result(folder: Path, name: str) -> float:
    """``val/…`` or ``samples/…`` of the run's summary.

    Raises ``ValueError`` if the run has no such number.
    """
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    stages = {"val": summary.get("metrics", {}), "samples": summary.get("samples", {})}
    numbers = {f"{stage}/{key}": value for stage, found in stages.items() for key, value in found.items()}
    if not isinstance(numbers.get(name), int | float):
        raise ValueError(f"sweep_metric: expected of {folder} one of {', '.join(sorted(numbers))}; found {name!r}")
    return float(numbers[name])
