"""The register of promises, and the comparisons of numbers that they are checked with."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halos.data.rows.token_rows import Row
from halos.objectives.base import Objective
from halos.testing.examples import Make, Result, tiny_rows

TIGHT, EXACT = 1e-9, 1e-12
"""Tolerances, relative to the numbers' size: for float64 sums in another order, and for equal operations."""


class Violation(AssertionError):
    """An objective breaks a promise."""


class NotApplicable(Exception):
    """An objective does not make this promise."""


Property = Callable[[Make, Sequence[Row]], None]
"""Checks one promise on one batch; raises :class:`Violation` or :class:`NotApplicable`."""
BatchMaker = Callable[[Objective], list[list[Row]]]
PROPERTIES: dict[str, Property] = {}
BATCHES: dict[str, BatchMaker] = {}


def promise(name: str, *sizes: int, batches: BatchMaker | None = None) -> Callable[[Property], Property]:
    """Register a property under a name. It is checked on batches of these sizes (smallest first), or on ``batches``."""

    def of_sizes(objective: Objective) -> list[list[Row]]:
        return [tiny_rows(objective, size) for size in sizes]

    def register(function: Property) -> Property:
        PROPERTIES[name] = function
        BATCHES[name] = batches or of_sizes
        return function

    return register


def agree(what: str, expected: Tensor | float, actual: Tensor | float, *, tolerance: float = TIGHT) -> None:
    """Raise :class:`Violation` unless the numbers or tensors agree, relative to their size. NaN agrees with NaN."""
    one, other = (torch.as_tensor(value, dtype=torch.float64) for value in (expected, actual))
    if one.shape != other.shape or not torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise Violation(f"{what}: expected {_text(one)}, found {_text(other)}")


def _text(value: Tensor) -> str:
    return f"{value.item():.12g}" if value.ndim == 0 else str([float(f"{x:.6g}") for x in value.flatten()[:8]])


def agree_on_gradients(what: str, expected: Result, actual: Result, *, tolerance: float = TIGHT) -> None:
    """Raise :class:`Violation` unless the gradients agree for each example of ``actual``, a subset of ``expected``."""
    for name, gradient in actual.gradients.items():
        wanted = expected.gradients[name]
        # Batches of other examples are padded to another width, where the gradient is 0.
        width = min(wanted.shape[-1], gradient.shape[-1])
        agree(f"{what}: gradient of {name}", wanted[:, :width], gradient[:, :width], tolerance=tolerance)


def agree_on_means(expected: Result, parts: Sequence[Result]) -> None:
    """Raise :class:`Violation` unless the parts' sums and counts of each metric add up to the expected mean."""
    for name, (expected_total, expected_count) in expected.means.items():
        # Sums and counts are added up first: a mean of the parts' means is wrong where the parts differ in size.
        total, count = (sum(part.means[name][i] for part in parts) for i in (0, 1))
        if bool(count) != bool(expected_count):
            raise Violation(f"metric {name}: expected a count of {expected_count}, found {count}")
        if count:
            agree(f"metric {name}", expected_total / expected_count, total / count)


def finite(result: Result) -> None:
    """Raise :class:`Violation` unless loss, gradients and metrics are finite numbers."""
    if not result.loss.isfinite():
        raise Violation(f"loss: expected a finite number, found {result.loss.item()}")
    for name, gradient in result.gradients.items():
        if not gradient.isfinite().all():
            raise Violation(f"gradient of {name}: expected finite numbers, found {_text(gradient)}")
    for name, (total, count) in result.means.items():
        if not (math.isfinite(total) and math.isfinite(count)):
            raise Violation(f"metric {name}: expected a finite sum and count, found {total} and {count}")
