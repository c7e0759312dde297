"""The value that a sweep gets for a finished run: a metric of its summary minus a penalty for its KL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

KL = "samples/kl"
SAMPLES = (
    KL, "samples/policy_desirable", "samples/policy_reward", "samples/reference_desirable", "samples/reference_reward",
)  # fmt: skip
"""Numbers of a summary that are computed from samples; runs on data with a true reward have them."""


def check_metric(name: str | None, *, max_kl: float | None, samples: bool) -> None:
    """Check the metric of a sweep before a run begins.

    Args:
        name: the metric; None without a sweep.
        max_kl: the KL above which trials are penalised.
        samples: whether the run's summary will have numbers of samples.

    Raises:
        ValueError: the summary cannot have this metric.
    """
    if name is None:
        return
    if not name.startswith("val/") and name not in SAMPLES:
        raise ValueError(f"sweep_metric: expected val/… or one of {', '.join(SAMPLES)}; found {name!r}")
    for key, wanted in (("sweep_metric", name), ("sweep_max_kl", KL if max_kl is not None else "")):
        if wanted in SAMPLES and not samples:
            needed = "data whose true reward is known, sampling.size above 0, a loss that generates"
            raise ValueError(f"{key}: expected a run with samples ({needed}) for {wanted}, found one without")


def check_validated(key: str, name: str | None, metrics: Mapping[str, float]) -> None:
    """Raise ``ValueError`` if a metric ``val/…`` is not one of the metrics of the first validation.

    Args:
        key: the configuration's key that names the metric.
        name: the metric; None for none.
        metrics: of the first validation.
    """
    # Which metrics a validation has depends on the loss and the data, so the name can be checked only after the first.
    known = sorted(f"val/{metric}" for metric in metrics)
    if name is not None and name.startswith("val/") and name not in known:
        wanted = f"one of {', '.join(known)}" if known else "no val/… without validation data"
        raise ValueError(f"{key}: expected {wanted}; found {name!r}")


def trial_value(folders: Sequence[Path], name: str, *, max_kl: float | None = None) -> float:
    """Return the mean of a metric over the runs of one trial, minus a penalty.

    The penalty is the number of nats by which the mean of ``samples/kl`` exceeds ``max_kl``, so that settings do not
    win by moving the policy far from its reference.

    Args:
        folders: the runs of the trial, which differ in their seeds.
        name: the metric.
        max_kl: nats per completion; None for no penalty.
    """
    value = fmean(result(folder, name) for folder in folders)
    if max_kl is None:
        return value
    return value - max(0.0, fmean(result(folder, KL) for folder in folders) - max_kl)


def result(folder: Path, name: str) -> float:
    """Return ``val/…`` or ``samples/…`` of a run's summary.

    Raises:
        ValueError: the run has no such number.
    """
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    stages = {"val": summary.get("metrics", {}), "samples": summary.get("samples", {})}
    numbers = {f"{stage}/{key}": value for stage, metrics in stages.items() for key, value in metrics.items()}
    if not isinstance(numbers.get(name), int | float):
        raise ValueError(f"sweep_metric: expected of {folder} one of {', '.join(sorted(numbers))}; found {name!r}")
    return float(numbers[name])
