"""What finished runs are worth, for a sweep that looks for the best settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

KL = "samples/kl"
SAMPLES = (
    KL, "samples/policy_desirable", "samples/policy_reward", "samples/reference_desirable", "samples/reference_reward",
)  # fmt: skip
"""What a run's summary says of its samples, where there are any."""


def check_metric(name: str | None, *, max_kl: float | None, samples: bool) -> None:
    """Look at what a sweep is told of a run that is about to begin; ``samples``: whether it will have any.

    Raises ``ValueError`` for a name that its summary cannot have.
    """
    if name is None:
        return
    if not name.startswith("val/") and name not in SAMPLES:
        raise ValueError(f"sweep_metric: expected val/… or one of {', '.join(SAMPLES)}; found {name!r}")
    for key, wanted in (("sweep_metric", name), ("sweep_max_kl", KL if max_kl is not None else "")):
        if wanted in SAMPLES and not samples:
            raise ValueError(
                f"{key}: expected a run with samples to compare (data whose true reward is known, sampling.size above "
                f"0, a loss that generates) for {wanted}, found one without"
            )


def check_validated(name: str | None, found: Mapping[str, float]) -> None:
    """Raise ``ValueError`` if ``val/…`` is not among what the first validation has found."""
    known = sorted(f"val/{key}" for key in found)
    if name is not None and name.startswith("val/") and name not in known:
        wanted = f"one of {', '.join(known)}" if known else "no val/… without validation data"
        raise ValueError(f"sweep_metric: expected {wanted}; found {name!r}")


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
