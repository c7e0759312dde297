"""The loss and the value of one completion under an objective, as functions of its implied reward."""

from collections.abc import Collection, Sequence
from enum import Enum

import torch
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives.base import Objective
from halos.policy.logprobs.completions import LogProbs
from halos.testing.examples import HIDDEN, Make, make_objective

REFERENCE = -5.0
"""log π_ref of every completion, in nats; each has one token."""


class Side(Enum):
    """Whether the completion in question is desirable.

    Objectives on pairs and on demonstrations have no undesirable side: a rejected completion is the reference point of
    the chosen one.
    """

    DESIRABLE = True
    UNDESIRABLE = False


def sides(objective: Objective) -> tuple[Side, ...]:
    """Return the sides that the objective's view has.

    Raises ``ValueError`` for a mixture of several views, whose parts have values of their own.
    """
    if objective.data_needs().views:
        raise ValueError(f"expected a loss of one view, found a mixture of {objective.view}; look at each part")
    return (Side.DESIRABLE, Side.UNDESIRABLE) if objective.view in ("binary", "scored") else (Side.DESIRABLE,)


class ImpliedLoss:
    """The loss of one completion as a function of r = log π_θ(y|x) − log π_ref(y|x), in nats.

    Args:
        make: an objective's class, or a ``functools.partial`` of it with parameters.
        side: whether the completion is desirable.
        terms: names of the terms of the loss to include; all of them if None.
    """

    def __init__(self, make: Make, side: Side, terms: Collection[str] | None = None) -> None:
        # In eval mode a loss with running statistics is a function of its inputs alone.
        self.objective = make_objective(make).eval()
        self.terms = terms
        rows = _rows(self.objective, side)
        self.batch = collate(rows, mismatched=self.objective.needs.mismatched)

    def __call__(self, log_ratio: float, others: float = 0.0, *, shift: float = 0.0) -> float:
        """Return the loss per example.

        Args:
            log_ratio: r of the completion, in nats.
            others: r of the completions it is compared with: the rejected or the mismatched one, or the other one of a
                scored group.
            shift: added to the completion's log π_θ and log π_ref, so that r stays.

        Raises:
            ValueError: if the loss has none of the terms.
        """
        return float(self._loss(self._log_ratios(log_ratio, others), others, shift).detach())

    def slopes(self, log_ratio: float, others: float = 0.0) -> tuple[float, float]:
        """Return the derivatives of the loss by the completion's r, and by that of the rejected one (0 if none is)."""
        ratios = self._log_ratios(log_ratio, others).requires_grad_()
        loss = self._loss(ratios, others)
        if not loss.requires_grad:  # a reward model's
            return 0.0, 0.0
        (gradient,) = torch.autograd.grad(loss, [ratios], materialize_grads=True, allow_unused=True)
        return float(gradient[0, 0]), float(gradient[0, 1]) if self.objective.view == "pairs" else 0.0

    def _log_ratios(self, log_ratio: float, others: float) -> Tensor:
        ratios = torch.full(self.batch.mask.shape, others, dtype=torch.float64)
        ratios[0, 0] = log_ratio
        return ratios

    def _loss(self, ratios: Tensor, others: float, shift: float = 0.0) -> Tensor:
        mask, needs = self.batch.mask, self.objective.needs
        reference = torch.full_like(ratios, REFERENCE)
        reference[0, 0] += shift
        # Hidden states of zero: a value head then gives every completion the same value.
        states = torch.zeros(*ratios.shape, HIDDEN, dtype=torch.float64)
        hidden = states if needs.hidden else None
        last = states[:, :, 0] if needs.last_hidden else None
        log_ref = LogProbs(reference, mask) if needs.reference else None
        logprobs = LogProbs(reference + ratios, mask, hidden, last)
        if needs.divergence:
            logprobs.divergence = torch.full_like(reference, others)
        if needs.log_collision:
            # Weights by the policy are held at 1, as no gradient flows into them.
            logprobs.log_collision = logprobs.tokens.detach()
        output = self.objective.compute(self.batch, logprobs, log_ref)
        chosen = [term for name, term in output.loss.items() if self.terms is None or name in self.terms]
        if not chosen:
            raise ValueError(f"terms: expected some of {', '.join(output.loss)}; found {self.terms}")
        return torch.stack([torch.as_tensor(term.total / term.count) for term in chosen]).sum()


def value_curve(
    make: Make, side: Side, gains: Sequence[float], *, terms: Collection[str] | None = None, others: float = 1.0
) -> list[float]:
    """Return the value of a completion for each of the gains: its r less the reference point, in nats.

    The value is the loss at the reference point minus the loss of the completion, and so 0 at a gain of 0.
    """
    loss = ImpliedLoss(make, side, terms)
    return [loss(others, others) - loss(others + gain, others) for gain in gains]


def _rows(objective: Objective, side: Side) -> list[Row]:
    scored = objective.view == "scored"
    count = 1 + (objective.view == "pairs") + objective.needs.mismatched
    labelled = scored or objective.view == "binary"

    def row(number: int, desirable: bool) -> Row:
        score = 1.0 if desirable else -1.0
        label = desirable if labelled else None
        return Row(f"example {number}", 0, (1,), ((2,),) * count, label, score if scored else None)

    # A scored completion has an advantage only in comparison with another one of its group.
    return [row(0, side.value), row(1, not side.value)] if scored else [row(0, side.value)]
