"""The register of promises, and how numbers are held against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from halos.data.rows.token_rows import Row
from halos.objectives.base import Objective
from halos.testing.examples import Answer, Make, tiny_rows

TIGHT, EXACT = 1e-9, 1e-12


class Violation(AssertionError):
    """A promise that an objective breaks."""


class NotApplicable(Exception):
    """The promise is not one that this objective makes."""


Property = Callable[[Make, Sequence[Row]], None]
PROPERTIES: dict[str, Property] = {}
BATCHES: dict[str, Callable[[Objective], list[list[Row]]]] = {}


def _mixed(objective: Objective, *sizes: int) -> list[list[Row]]:
    return [tiny_rows(objective, size) for size in sizes]


def promise(name: str, *sizes: int, batches: Callable[[Objective], list[list[Row]]] | None = None) -> Any:
    """Register a property; it is tried on batches of these sizes, smallest first."""

    def register(function: Property) -> Property:
        PROPERTIES[name] = function
        BATCHES[name] = batches or (lambda objective: _mixed(objective, *sizes))
        return function

    return register


def agree(what: str, expected: Any, found: Any, *, tolerance: float = TIGHT) -> None:
    """Raise :class:`Violation` unless the numbers or tensors agree, relative to their size."""
    one, other = (torch.as_tensor(value, dtype=torch.float64) for value in (expected, found))
    if one.shape != other.shape or not torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise Violation(f"{what}: expected {_text(one)}, found {_text(other)}")


def _text(value: Tensor) -> str:
    return f"{value.item():.12g}" if value.ndim == 0 else str([float(f"{x:.6g}") for x in value.flatten()[:8]])


def agree_on_gradients(what: str, expected: Answer, found: Answer, *, tolerance: float = TIGHT) -> None:
    """The gradient of the token log-probs of each example that was ``found`` is the same in both answers."""
    for name, other in found.gradients.items():
        gradient = expected.gradients[name]
        width = min(gradient.shape[-1], other.shape[-1])
        agree(f"{what}: gradient of {name}", gradient[:, :width], other[:, :width], tolerance=tolerance)


def finite(answer: Answer) -> None:
    """Raise :class:`Violation` unless loss, gradients and metrics are finite numbers."""
    if not answer.loss.isfinite():
        raise Violation(f"loss: expected a finite number, found {answer.loss.item()}")
    for name, gradient in answer.gradients.items():
        if not gradient.isfinite().all():
            raise Violation(f"gradient of {name}: expected finite numbers, found {_text(gradient)}")
    for name, (total, count) in answer.means.items():
        if not (math.isfinite(total) and math.isfinite(count)):
            raise Violation(f"metric {name}: expected a finite sum and count, found {total} and {count}")


def same_means(whole: Answer, parts: Sequence[Answer]) -> None:
    """The parts' sums and counts of each metric, added up, give the mean of the whole."""
    for name in whole.means:
        total, count = (sum(part.means[name][i] for part in parts) for i in (0, 1))
        expected_total, expected_count = whole.means[name]
        if bool(count) != bool(expected_count):
            raise Violation(f"metric {name}: expected a count of {expected_count}, found {count}")
        if count:
            agree(f"metric {name}", expected_total / expected_count, total / count)
