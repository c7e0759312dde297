"""Calibration: the preference probability that rewards imply, σ(r_chosen − r_rejected), against how often it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halos.metrics import TIE

BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of similar confidence: their mean confidence, the share on which the policy was right, and how many."""

    confidence: float
    accuracy: float
    count: int


def reliability(margins: Sequence[float], bins: int = BINS) -> list[Bin]:
    """Pairs by the confidence max(p, 1 − p), p = σ(margin), in ``bins`` equal parts of [0.5, 1]; empty ones left out.

    A tie counts as half right, as in the reward accuracy.
    """
    m = np.asarray(margins, dtype=float)
    confidence = 1 / (1 + np.exp(-np.abs(m)))
    right = np.where(np.abs(m) <= TIE, 0.5, m > 0)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        Bin(float(confidence[place == b].mean()), float(right[place == b].mean()), int((place == b).sum()))
        for b in range(bins)
        if (place == b).any()
    ]


def calibration_error(margins: Sequence[float], bins: int = BINS) -> float:
    """ECE: |confidence − accuracy| of the bins, weighted by their counts (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    found = reliability(margins, bins)
    return sum(b.count * abs(b.confidence - b.accuracy) for b in found) / len(margins)


def draw_reliability(bins: Sequence[Bin], error: float, file: Path) -> None:
    """The reliability diagram, with the number of pairs below."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(4.2, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    x = [b.confidence for b in bins]
    above.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", linewidth=1)
    above.plot(x, [b.accuracy for b in bins], marker="o", color="tab:blue")
    above.set(ylabel="accuracy", title=f"ECE {error:.3f}", ylim=(min(0.45, *(b.accuracy - 0.05 for b in bins)), 1.02))
    below.bar(x, [b.count for b in bins], width=0.03, color="tab:blue")
    below.set(xlabel="confidence σ(|margin|)", ylabel="pairs", xlim=(0.48, 1.02))
    figure.savefig(file, dpi=150)
