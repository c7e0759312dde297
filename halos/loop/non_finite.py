"""Describes a step whose loss or gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

from halos.loop.steps import Step
from halos.processes.collectives import all_gather_list


def non_finite_problem(step: Step, metrics: Mapping[str, float], *, scaled: bool, spoilt: bool) -> str | None:
    """Return the problem, with the ids of the step's examples on all ranks; None if loss and gradient are finite.

    Args:
        step: the step of this rank.
        metrics: the step's metrics over all ranks, so that all ranks find the same problem.
        scaled: whether only the loss is checked, because a gradient scaler (16-mixed) skips steps with infinite
            gradients itself while it searches for its scale.
        spoilt: whether the optimizer has used the gradient already.
    """
    names = ("loss",) if scaled else ("loss", "grad_norm")
    problem = next((f"{name} is {metrics[name]}" for name in names if not math.isfinite(metrics[name])), None)
    if problem is None:
        return None
    weights = "are spoilt, those of the last checkpoint are not" if spoilt else "were not changed"
    ids = ", ".join(all_gather_list(step.ids))
    return f"{problem} at step {step.number}; the weights {weights}. Examples of this step: {ids}"
