"""Calibration: the preference probability that rewards imply, σ(r_chosen − r_rejected), against the observed share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halos.metrics import TIE

BINS = 10
Array = NDArray[np.float64]


def reliability(margins: ArrayLike, bins: int = BINS) -> tuple[Array, Array, Array]:
    """Sort pairs into bins by the confidence max(p, 1 − p), where p = σ(margin).

    Args:
        margins: r_chosen − r_rejected of each pair, [n].
        bins: the number of equal parts of [0.5, 1].

    Returns:
        For each bin that has pairs: their mean confidence, in [0.5, 1]; the share of pairs whose chosen completion has
        the higher reward (a tie counts as half, as in the reward accuracy); and the number of pairs.
    """
    m = np.asarray(margins, dtype=float)
    confidence = 1 / (1 + np.exp(-np.abs(m)))
    correct = np.where(np.abs(m) <= TIE, 0.5, m > 0)
    # A confidence of exactly 1 belongs to the last bin, not to another one after it.
    number = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    counts = np.bincount(number)
    filled = counts > 0
    means = [np.bincount(number, values)[filled] / counts[filled] for values in (confidence, correct)]
    return means[0], means[1], counts[filled].astype(float)


def calibration_error(margins: ArrayLike, bins: int = BINS) -> float:
    """ECE: mean |confidence − accuracy| of the bins, weighted by count (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    confidence, accuracy, count = reliability(margins, bins)
    return float(np.average(np.abs(confidence - accuracy), weights=count))


def draw_reliability(margins: ArrayLike, file: Path) -> None:
    """Draw the reliability diagram, with the number of pairs of each bin below it, into an image file."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(4.2, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    confidence, accuracy, count = reliability(margins)
    above.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", linewidth=1)
    above.plot(confidence, accuracy, marker="o", color="tab:blue")
    lowest = min(0.45, float(accuracy.min()) - 0.05)
    above.set(ylabel="accuracy", title=f"ECE {calibration_error(margins):.3f}", ylim=(lowest, 1.02))
    below.bar(confidence, count, width=0.03, color="tab:blue")
    below.set(xlabel="confidence σ(|margin|)", ylabel="pairs", xlim=(0.48, 1.02))
    figure.savefig(file, dpi=150)
