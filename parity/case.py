"""The same model and rows for both sides; a loss and its gradient as one vector, so that equations are sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives.base import Objective
from halos.policy.backbone import Backbone
from halos.testing.examples import loss_of
from tests import tiny

TOLERANCE = 1e-5
SEEDS = (0, 1, 3)
"""The mean log-ratio of y' is below 0 with the first two and above with the last: KTO's z₀, clamped and not."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The largest difference in one quantity, and the largest of its values."""

    name: str
    quantity: str
    difference: float
    size: float


class Case:
    """A tiny Llama in float32 that has left its reference, and rows of ragged lengths.

    ``pairs`` have (chosen, rejected), and ``unpaired`` are the same as single completions; ``labelled`` have (y, y')
    and a label, not equally many of each, and ``single`` are the same without y'.
    """

    def __init__(self, *, seed: int, packing: bool, folder: Path) -> None:
        self.seed, self.packing, self.folder = seed, packing, folder
        self.backbone = Backbone(tiny.model(seed=seed), with_reference=True)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.backbone.policy.parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        self.labelled = tiny.rows(5, branches=2, seed=seed)
        self.pairs = [replace(row, desirable=None) for row in self.labelled]
        self.single = [replace(row, branches=row.branches[:1]) for row in self.labelled]
        self.unpaired = [
            replace(row, branches=(branch,), desirable=desirable)
            for row in self.pairs
            for branch, desirable in zip(row.branches, (True, False), strict=True)
        ]
        self.compared: list[Comparison] = []

    def ours(self, make: Callable[[Backbone], Objective], rows: Sequence[Row]) -> Tensor:
        """Loss and gradient as a training step computes them."""
        objective = make(self.backbone)
        objective.configure_model()
        objective.train()
        batch = collate(rows, mismatched=objective.needs.mismatched, chunks=2, packing=self.packing)
        output, _ = objective.compute_batch(batch)
        return measure(loss_of(output), self.backbone.policy)

    def compare(self, name: str, ours: Tensor, theirs: Tensor, *, tolerance: float = TOLERANCE) -> None:
        """Remembers the largest differences of loss and gradient; fails where one is above the tolerance.

        The tolerance is absolute for numbers up to 1, and relative to the largest above.
        """
        for quantity, part in {"loss": slice(1), "gradient": slice(1, None)}.items():
            difference, size = (ours - theirs)[part].abs().max(), theirs[part].abs().max()
            self.compared.append(Comparison(name, quantity, float(difference), float(size)))
        for found in self.compared:
            assert found.size > 100 * TOLERANCE  # else zeros would pass
            # Float32 rounds relative to the size of the numbers, which is far above 1 for squared losses.
            allowed = tolerance * max(1.0, found.size)
            assert found.difference <= allowed, f"{name}: the {found.quantity} differs by {found.difference:.1e}"


def measure(loss: Tensor, model: nn.Module) -> Tensor:
    """[1 + P]: the loss, then its gradient with respect to each of the model's P numbers."""
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([loss.detach()[None], *(gradient.flatten() for gradient in gradients)])
