"""Calibration: the preference probability that rewards imply, σ(r_chosen − r_rejected), against how often it holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from halos.metrics import TIE

BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of similar confidence.

    Attributes:
        confidence: their mean confidence, in [0.5, 1].
        accuracy: the share of them in which the chosen completion has the higher reward.
        count: the number of pairs.
    """

    confidence: float
    accuracy: float
    count: int


def reliability(margins: ArrayLike, bins: int = BINS) -> list[Bin]:
    """Sort pairs into bins by the confidence max(p, 1 − p), where p = σ(margin).

    Args:
        margins: r_chosen − r_rejected of each pair, [n].
        bins: the number of equal parts of [0.5, 1].

    Returns:
        The bins that have pairs. A tie counts as half correct, as in the reward accuracy.
    """
    m = np.asarray(margins, dtype=float)
    confidence = 1 / (1 + np.exp(-np.abs(m)))
    correct = np.where(np.abs(m) <= TIE, 0.5, m > 0)
    # A confidence of exactly 1 belongs to the last bin, not to one after it.
    number = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    members = [number == b for b in range(bins)]
    return [
        Bin(float(confidence[own].mean()), float(correct[own].mean()), int(own.sum())) for own in members if own.any()
    ]


def calibration_error(margins: ArrayLike, bins: int = BINS) -> float:
    """ECE: mean |confidence − accuracy| of the bins, weighted by count (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    filled = reliability(margins, bins)
    return sum(b.count * abs(b.confidence - b.accuracy) for b in filled) / sum(b.count for b in filled)


def draw_reliability(margins: ArrayLike, file: Path) -> None:
    """Draw the reliability diagram, with the number of pairs of each bin below it, into an image file."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(4.2, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = reliability(margins)
    x = [b.confidence for b in bins]
    above.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", linewidth=1)
    above.plot(x, [b.accuracy for b in bins], marker="o", color="tab:blue")
    lowest = min(0.45, *(b.accuracy - 0.05 for b in bins))
    above.set(ylabel="accuracy", title=f"ECE {calibration_error(margins):.3f}", ylim=(lowest, 1.02))
    below.bar(x, [b.count for b in bins], width=0.03, color="tab:blue")
    below.set(xlabel="confidence σ(|margin|)", ylabel="pairs", xlim=(0.48, 1.02))
    figure.savefig(file, dpi=150)
