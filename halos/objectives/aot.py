"""AOT: Alignment via Optimal Transport (Melnyk et al. 2024, arXiv 2406.05882)."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.config.parameters import require_between, require_positive
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output


def aot_loss(
    u: Tensor, v: Tensor, weights: Tensor | None = None, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """The AOT loss of each u: −(1 − ε) log σ(β(u − v)) − ε log σ(−β(u − v)), for the v of equal rank.

    The k-th smallest u is compared with the k-th smallest v. Training moves the distribution of u above that of v.
    AOT (paired): u = log π_θ(y_w|x) − log π_θ(y_l|x), and v is the same under π_ref.
    AOT (unpaired): u = r of chosen and v = r of rejected completions, r = log π_θ(y|x) − log π_ref(y|x).

    Args:
        u, v: as above, in nats, [N].
        weights: how much each pair counts, [N]; None: all 1. A u of weight 2 is compared with two v of weight 1.
        beta: β, the scale of the implied reward.
        label_smoothing: ε, the probability that a recorded preference is flipped.

    Returns:
        Losses [N], to be averaged over pairs by weight.
    """
    weights = torch.ones_like(u) if weights is None else weights.to(u)
    (u, mass_u, place), (v, mass_v, _) = _distinct(u, weights), _distinct(v, weights)
    i, j, mass = _equal_ranks(mass_u, mass_v)
    margins = beta * (u[i] - v[j])
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    return _divided(torch.zeros_like(u).index_add(0, i, mass * losses), mass_u)[place]


def _distinct(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct values in ascending order, their weights, and the place of each value among them.

    A value that occurs several times is computed as the mean of its copies, so they share its gradient. The results are
    as long as the input, so that the number of distinct values need not be read from the device; the last entries may
    have weight 0.
    """
    ordered, order = values.detach().sort()
    place = torch.zeros_like(order).scatter(0, order, (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0))
    zeros = torch.zeros_like(weights)
    mass = zeros.index_add(0, place, weights)
    return _divided(zeros.index_add(0, place, weights * values), mass), mass, place


def _divided(sums: Tensor, masses: Tensor) -> Tensor:
    return sums / torch.where(masses > 0, masses, 1.0)


def _equal_ranks(mass_u: Tensor, mass_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The optimal transport between ascending numbers with these masses: places i and j, and the mass of each."""
    ends = mass_u.cumsum(0), mass_v.cumsum(0)
    # Between two cuts one u and one v are in force. Equal cuts leave places without mass.
    cuts = torch.cat(ends).sort().values
    mass = cuts.diff(prepend=cuts.new_zeros(1))
    middles = cuts - mass / 2
    # Rounding may leave a middle above the end of the other side, whose last place with mass is then meant.
    i, j = (torch.searchsorted(end, torch.minimum(middles, end[-1:])) for end in ends)
    return i, j, mass


class _AOT(Objective):
    view = "pairs"
    paper = ("Distributional Preference Alignment of LLMs via Optimal Transport", "https://arxiv.org/abs/2406.05882")
    needs = Needs(whole_micro_step=True)
    name: str

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.beta = require_positive("beta", beta)
        self.label_smoothing = require_between("label_smoothing", label_smoothing, 0.0, 0.5)

    @abstractmethod
    def compared(self, policy: LogProbs, reference: LogProbs) -> tuple[Tensor, Tensor]:
        """Return u and v, [B]."""

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> Output:
        loss = partial(aot_loss, beta=self.beta, label_smoothing=self.label_smoothing)
        mean = self.per_coupled_example(loss, self.compared(policy, reference), batch)
        return Output({self.name: mean}, self.beta * (policy.sum - reference.sum))


class AOT(_AOT):
    """AOT on pairs: raises the distribution of the policy's margins between two completions above the reference's.

    The margins of all ranks' pairs in the micro-step are sorted together.

    Deviations from the paper:
        1. Only its logistic loss is implemented, as in TRL, with exact instead of soft sorting.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        label_smoothing: ε in [0, 1/2).

    Raises:
        ValueError: naming the key of a value out of range.
    """

    name = "aot"

    def compared(self, policy: LogProbs, reference: LogProbs) -> tuple[Tensor, Tensor]:
        margins = [logprobs.sum[:, 0] - logprobs.sum[:, 1] for logprobs in (policy, reference)]
        return margins[0], margins[1]


class AOTUnpaired(_AOT):
    """AOT with the two sides of pairs as two sets: raises the distribution of chosen rewards above the rejected ones'.

    The log-ratios of all ranks' pairs in the micro-step are sorted together.

    Deviations from the paper:
        1. As for :class:`AOT`.
        2. Chosen and rejected completions come from pairs, so there are equally many of both.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        label_smoothing: ε in [0, 1/2).

    Raises:
        ValueError: naming the key of a value out of range.
    """

    name = "aot_unpaired"

    def compared(self, policy: LogProbs, reference: LogProbs) -> tuple[Tensor, Tensor]:
        log_ratios = policy.sum - reference.sum
        return log_ratios[:, 0], log_ratios[:, 1]
