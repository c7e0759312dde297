"""f-DPO: DPO under other divergences than the reverse KL (Wang et al. 2023, arXiv 2309.16240)."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.checks import check_choice
from halos.config.parameters import require_between, require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Objective, Output

DIVERGENCES = ("forward_kl", "jensen_shannon", "alpha")
MAX_EXPONENT = 80.0
"""Of e: its power is finite in float32. Beyond it the reward is constant."""


def f_derivative(log_ratios: Tensor, divergence: str, alpha: float | None = None) -> Tensor:
    """f'(u) at u = π_θ/π_ref for the f of a divergence, plus the constant that makes it 0 at u = 1.

    Args:
        log_ratios: log u, in nats, any shape.
        divergence: ``forward_kl``: 1 − 1/u; ``jensen_shannon``: log 2u/(1 + u); ``alpha``: (1 − u^−α)/α.
        alpha: α in (0, 1), only for ``alpha``. Towards 0 the divergence becomes the reverse KL, as in DPO; at 1 it is
            the forward KL.

    Returns:
        The implied rewards over β, in the shape of ``log_ratios``.
    """
    if divergence == "jensen_shannon":
        return math.log(2) + logsigmoid(log_ratios)
    power = 1.0 if alpha is None else alpha
    return -torch.expm1((-power * log_ratios).clamp(max=MAX_EXPONENT)) / power


def f_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.1,
    divergence: str = "jensen_shannon",
    alpha: float | None = None,
) -> Tensor:
    """The f-DPO loss of each pair: −log σ(β f'(u_w) − β f'(u_l)), u = π_θ(y|x) / π_ref(y|x).

    w is the chosen completion and l the rejected one. f' is the derivative of the divergence's f
    (:func:`f_derivative`); f'(u) = log u, the reverse KL, would be DPO.

    Args:
        chosen, rejected: log u, summed over the completion's tokens, in nats, [B].
        beta: β, the strength of the constraint.
        divergence, alpha: see :func:`f_derivative`.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    margin = f_derivative(chosen, divergence, alpha) - f_derivative(rejected, divergence, alpha)
    return -logsigmoid(beta * margin)


class FDPO(Objective):
    """DPO on pairs, where another divergence than the reverse KL keeps the policy near the reference.

    The logged rewards are β f'(u), which are 0 where policy and reference agree.

    Deviations from the paper:
        1. u^−α is constant above e^80, where float32 would overflow.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        divergence: ``forward_kl``, ``jensen_shannon`` or ``alpha``; ``loss=dpo`` has the reverse KL.
        alpha: α in (0, 1), only for ``alpha``; null for the others.

    Raises:
        ValueError: a value is out of range (the error names its key), or α does not go with the divergence.
    """

    view = "pairs"
    paper = (
        "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
        "https://arxiv.org/abs/2309.16240",
    )

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 0.1,
        divergence: str = "jensen_shannon",
        alpha: float | None = None,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        check_choice("loss.divergence", divergence, DIVERGENCES)
        if alpha is not None and divergence != "alpha":
            raise ValueError(f"loss.alpha: expected null with loss.divergence={divergence}, found {alpha}")
        self.divergence = divergence
        # NaN is in no range: a missing α is refused like a wrong one.
        number = math.nan if alpha is None else alpha
        self.alpha = require_between("alpha", number, 0.0, 1.0, open_low=True) if divergence == "alpha" else None

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        log_ratios = policy.sum - reference.sum
        losses = f_dpo_loss(*log_ratios.unbind(1), beta=self.beta, divergence=self.divergence, alpha=self.alpha)
        rewards = self.beta * f_derivative(log_ratios, self.divergence, self.alpha)
        return Output(loss={"f_dpo": self.per_example(losses, batch)}, rewards=rewards)
