"""KTO: Kahneman-Tversky Optimization (Ethayarajh et al. 2024, arXiv 2402.01306)."""

from __future__ import annotations

import logging
from typing import Literal, Unpack

import torch
from torch import Tensor

from halos.config.parameters import require_positive, require_weight
from halos.loop.reference_point import reference_point as make_reference_point
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output

log = logging.getLogger(__name__)

Weight = float | Literal["auto"]


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    z0: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """The KTO loss of each completion (section 4.1 of the paper): λ_y − v(x, y).

    v = λ_D σ(β(r − z₀)) for desirable y and λ_U σ(β(z₀ − r)) for undesirable y, r = log π_θ(y|x) − log π_ref(y|x).
    λ_y is λ_D or λ_U. z₀ is the reference point, an estimate of KL(π_θ ‖ π_ref).

    Args:
        policy, reference: log π(y|x), summed over the completion's tokens, in nats, [B].
        desirable: whether y is desirable given x, bool [B].
        z0: z₀, the reference point (:mod:`halos.loop.reference_point`), in nats, a scalar or [B]. No gradient flows
            into it.
        beta: β, how fast the value saturates.
        desirable_weight, undesirable_weight: λ_D, λ_U.

    Returns:
        Losses [B], to be averaged over examples.
    """
    r = policy - reference
    z0 = z0.detach() if isinstance(z0, Tensor) else z0
    desirable_loss = desirable_weight * (1 - torch.sigmoid(beta * (r - z0)))
    undesirable_loss = undesirable_weight * (1 - torch.sigmoid(beta * (z0 - r)))
    return torch.where(desirable, desirable_loss, undesirable_loss)


def kto_weights(desirable_weight: Weight, undesirable_weight: Weight, n_d: float, n_u: float) -> tuple[float, float]:
    """Return (λ_D, λ_U), with ``auto`` resolved from the counts of the training data.

    An automatic weight starts at 1 and is changed only as much as is needed to bring λ_D n_D / (λ_U n_U) into [1, 4/3],
    the interval that the paper's first version recommends. If both are automatic, the weight of the rarer kind is
    raised.

    Args:
        desirable_weight, undesirable_weight: λ_D, λ_U, or ``auto``.
        n_d, n_u: numbers of desirable and undesirable training completions, by weight.

    Raises:
        ValueError: if a weight is automatic and one of the numbers is 0.
    """
    low, high = 1.0, 4 / 3
    fixed_d, fixed_u = (1.0 if weight == "auto" else float(weight) for weight in (desirable_weight, undesirable_weight))
    if "auto" not in (desirable_weight, undesirable_weight):
        return fixed_d, fixed_u
    if not n_d or not n_u:
        name = "desirable_weight" if desirable_weight == "auto" else "undesirable_weight"
        found = f"found {n_d:g} desirable and {n_u:g} undesirable ones"
        hint = "set loss.desirable_weight and loss.undesirable_weight to numbers"
        raise ValueError(f"loss.{name}=auto: expected both kinds of completions in the training data, {found}; {hint}")
    # The ratio moves to the nearer end of the interval, by a factor on λ_D or its inverse on λ_U.
    ratio = fixed_d * n_d / (fixed_u * n_u)
    change = min(max(ratio, low), high) / ratio
    raise_desirable = desirable_weight == "auto" and (change >= 1 or undesirable_weight != "auto")
    return (fixed_d * change, fixed_u) if raise_desirable else (fixed_d, fixed_u / change)


class KTO(Objective):
    """KTO on single completions labelled desirable or undesirable.

    The reference-free variant assumes that π_ref is uniform over outputs, as the paper does. Then log π_ref(y|x) is the
    same for all y and cancels in r − z₀ = log π_θ(y|x) − E_y' log π_θ(y'|x), so no reference model is needed. For y'
    from the policy, the expectation is −H(π_θ(·|x)); it is estimated by the mean over mismatched y'. This z₀ is not
    clamped: without the cancelled constant it is a mean of log π_θ, which is never positive.

    The weight of an example also applies to its y' in z₀. Automatic λ are computed from sums of weights.

    Deviations from the paper:
        1. y' is another prompt's completion, drawn by a seeded derangement of the data set, not the next example of
           the batch. Data can be shuffled freely, and batch size 1 works.
        2. The mean in z₀ is over the examples of all ranks in the micro-step, not over those of one device.
        3. Without a reference, the y' are other prompts' completions and not samples of π_θ(·|x), so the estimate of −H
           is too low. And as π_ref is uniform over outputs, not over tokens, long completions have low rewards.
        4. Two examples of one conversation are drawn together (``data.keep_together``), not independently.
        5. With ``data.streaming``, y' is the completion of the next example of another prompt in the shuffled stream.
           This is the paper's choice without its batch edges; each completion is y' once.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        beta: β, above 0.
        desirable_weight, undesirable_weight: λ_D and λ_U, 0 or more, or ``auto`` (:func:`kto_weights`; its interval
            comes from the paper's first version; later versions widen it to [1, 3/2]).
        reference_point: how z₀ is estimated: ``mismatched`` as in the paper, or ``zero``, ``running``, ``per_prompt``,
            ``token`` or ``policy``; see :mod:`halos.loop.reference_point`.
        reference_point_steps: for ``running``, the optimizer steps in its mean; for ``policy``, those from one refresh
            to the next; None: 32.
        clamp_reference_point: take the maximum of z₀ and 0, as the paper does. Without a reference, z₀ is not clamped.
        reference_free: use no reference; rewards are then β log π_θ(y|x).
        step_labels: learn also from labelled steps of replies (Step-KTO). Each labelled step is an example: the steps
            before it are context that is not scored, and its weight is that of its record, divided by the number of
            labelled steps of its reply.

    Raises:
        ValueError: a value is out of range (the error names its key), or a combination of values has no meaning.
    """

    view = "binary"
    paper = ("KTO: Model Alignment as Prospect Theoretic Optimization", "https://arxiv.org/abs/2402.01306")
    needs = Needs(mismatched=True, whole_micro_step=True)

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        beta: float = 0.1,
        desirable_weight: Weight = 1.0,
        undesirable_weight: Weight = 1.0,
        reference_point: str = "mismatched",
        reference_point_steps: int | None = None,
        clamp_reference_point: bool = True,
        reference_free: bool = False,
        step_labels: bool = False,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        clamp = clamp_reference_point and not reference_free
        self.reference_point = make_reference_point(reference_point, clamp=clamp, steps=reference_point_steps)
        if reference_free and reference_point != "mismatched":
            found = f"found {reference_point!r}: log π_θ without a reference is always below 0"
            raise ValueError(f"loss.reference_point: expected mismatched with loss.reference_free=true, {found}")
        self.beta = require_positive("beta", beta)
        self.desirable_weight = require_weight("desirable_weight", desirable_weight)
        self.undesirable_weight = require_weight("undesirable_weight", undesirable_weight)
        counted = "auto" in (self.desirable_weight, self.undesirable_weight)
        loss_needs = Needs(reference=not reference_free, label_counts=counted, step_labels=step_labels)
        self.needs = loss_needs | self.reference_point.needs

    def see_labels(self, desirable: float, undesirable: float) -> None:
        # A run calls this twice. In the second call, from the Trainer, the weights are already numbers.
        if "auto" not in (self.desirable_weight, self.undesirable_weight):
            return
        weights = kto_weights(self.desirable_weight, self.undesirable_weight, desirable, undesirable)
        self.desirable_weight, self.undesirable_weight = weights
        message = "KTO weights from %g desirable and %g undesirable completions: λ_D = %.4g, λ_U = %.4g"
        log.info(message, desirable, undesirable, *weights)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs | None) -> Output:
        assert batch.desirable is not None  # the view is binary
        # Without a reference, log π_ref is the same for all y and cancels in r − z₀, so 0 serves.
        log_ref = torch.zeros_like(policy.sum) if reference is None else reference.sum
        z0, metrics = self.reference_point(batch, policy, log_ref)
        # The weights are numbers here: see_labels() has replaced "auto" before the first step.
        weights = {name: float(getattr(self, name)) for name in ("desirable_weight", "undesirable_weight")}
        losses = kto_loss(policy.sum[:, 0], log_ref[:, 0], batch.desirable, z0, beta=self.beta, **weights)
        rewards = self.beta * (policy.sum - log_ref)[:, :1]
        return Output({"kto": self.per_example(losses, batch)}, rewards, metrics)

    def end_step(self) -> None:
        self.reference_point.end_step()
