"""Any human-aware loss (HALO), with a named value function or a formula (Ethayarajh et al. 2024, arXiv 2402.01306)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from halos.checks import check_choice
from halos.config.parameters import require_between, require_positive, require_weight
from halos.formulas.value import value_function
from halos.loop.reference_point import REFERENCE_POINTS, ReferencePoint, reference_point as make_reference_point
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Mean, Needs, Objective, Output
from halos.objectives.kto import Weight, kto_weights
from halos.transfer import as_like

log = logging.getLogger(__name__)

REWARDS = ("log_ratio", "mean_log_ratio", "log_prob", "mean_log_prob")
VIEWS = ("binary", "pairs", "scored")
WEIGHTINGS: dict[str, Callable[[float], float]] = {
    "none": lambda p: p,
    "prelec": lambda p: math.exp(-((-math.log(p)) ** 0.65)),
    "tversky_kahneman": lambda p: p**0.61 / (p**0.61 + (1 - p) ** 0.61) ** (1 / 0.61),
}
"""How people weigh a probability p: Prelec (1998), and Tversky and Kahneman (1992), with their estimates of γ."""


def halo_loss(
    u: Tensor,
    good: Tensor,
    value: Callable[[Tensor], Tensor],
    *,
    constant: float,
    desirable_weight: float,
    undesirable_weight: float,
    right: float = 1.0,
    wrong: float = 0.0,
) -> Tensor:
    """The human-aware loss of each completion or pair (Definition 3.4 of the paper): λ_y (C − v(±u)).

    u = r − z₀ is the reward minus the reference point. A desirable completion is a gain of u and an undesirable one a
    gain of −u, as in KTO. λ_y is λ_D or λ_U.

    A pair is a desirable completion whose reference point is the reward of the rejected one: u = r_w − r_l.

    If labels are wrong with probability ε, the loss weights both cases, with a probability weighting w:
    λ_y (w(1 − ε)(C − v(±u)) + w(ε)(C − v(∓u))).

    Args:
        u: r − z₀ in nats, [B].
        good: whether the completion is desirable, bool [B].
        value: v, such as :class:`halos.formulas.value.ValueFunction`.
        constant: C.
        desirable_weight, undesirable_weight: λ_D, λ_U.
        right, wrong: w(1 − ε), w(ε).

    Returns:
        Losses [B], to be averaged over examples.
    """
    gains = torch.where(good, u, -u)
    losses = right * (constant - value(gains))
    if wrong:
        losses = losses + wrong * (constant - value(-gains))
    return torch.where(good, desirable_weight * losses, undesirable_weight * losses)


class HALO(Objective):
    """A human-aware loss whose value function is named or given as a formula: λ_y (C − v(±(r − z₀))).

    ``value`` is a formula in u = r − z₀, in nats, such as ``where(u > 0, u**0.88, -2.25*(-u)**0.88)``. It may contain
    numbers, + - * / **, the parameters ``beta`` (β), ``alpha`` (α) and ``loss_aversion`` (λ), and the functions exp,
    log, log1p, expm1, sigmoid, log_sigmoid, tanh, softplus, relu, abs, sqrt, sign, min, max, clip and where. At step 0,
    u is 0, where a power x**p with 0 < p < 1 has an infinite slope. For x below ε = 0.001 such a power is replaced by
    the parabola through 0 that has its value and slope at ε. C is 0 for a formula.

    The view decides which feedback is read.
        ``binary``: labels. A desirable completion is a gain of u, an undesirable one of −u.
        ``pairs``: the rejected completion is the reference point of the chosen one, u = r_w − r_l.
        ``scored``: graded feedback. A score s is read as |s − τ| labels, desirable if s is above the threshold τ and
        undesirable below, so that the loss is |s − τ| λ_y (C − v(±u)). Scores of ±1 with τ = 0 give the binary loss.

    Labels, or the order of pairs, may be wrong with a known probability ε (``noise``). Then the loss is the sum over
    both cases, each times its probability or the weight that people give to it (``probability_weighting``).

    The logged rewards are β r if the formula contains β, else r.

    Deviations from the paper:
        1. Powers between 0 and 1 and square roots are smoothed within ε = 0.001 of 0, where their slope is infinite.
        2. z₀ is estimated as by :class:`halos.objectives.KTO`, with the deviations listed there.
        3. The definition has no scored completions and no rewards other than log-ratios.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        value: v: ``kahneman_tversky``, ``logistic``, ``log_sigmoid``, ``linear``, ``tanh``, ``hinge``, ``exponential``
            (:data:`halos.formulas.value.VALUES`), or a formula in u.
        view: ``binary``, ``pairs`` or ``scored``.
        reward: r: ``log_ratio`` log π_θ(y|x)/π_ref(y|x), ``log_prob`` log π_θ(y|x) without a reference, or their means
            over the tokens of y: ``mean_log_ratio``, ``mean_log_prob``.
        beta: β, above 0; None: 0.1 if the formula contains it.
        alpha: α, the exponent of the Kahneman-Tversky value, above 0; None: 0.88.
        loss_aversion: λ, above 0; None: 2.25.
        desirable_weight, undesirable_weight: λ_D and λ_U, 0 or more, or ``auto`` with labels
            (:func:`halos.objectives.kto.kto_weights`); None: 1.
        reference_point: how z₀ is estimated, see :class:`halos.objectives.KTO`; None: ``mismatched``, or for pairs the
            rejected completion.
        reference_point_steps: see :class:`halos.objectives.KTO`.
        clamp_reference_point: take the maximum of z₀ and 0; None: if there is a reference.
        threshold: τ of scored completions; None: 0.
        noise: ε, above 0 and below 1/2; None: 0.
        probability_weighting: w: ``none``, ``prelec`` exp(−(−log p)^0.65), or ``tversky_kahneman``
            p^γ / (p^γ + (1 − p)^γ)^(1/γ) with γ = 0.61; None: ``none``.

    Raises:
        ValueError: a value is out of range, not a formula, or has no effect. The error names its key.
    """

    view = "binary"
    paper = ("KTO: Model Alignment as Prospect Theoretic Optimization", "https://arxiv.org/abs/2402.01306")
    needs = Needs(mismatched=True, whole_micro_step=True)

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        value: str = "kahneman_tversky",
        view: str = "binary",
        reward: str = "log_ratio",
        beta: float | None = None,
        alpha: float | None = None,
        loss_aversion: float | None = None,
        desirable_weight: Weight | None = None,
        undesirable_weight: Weight | None = None,
        reference_point: str | None = None,
        reference_point_steps: int | None = None,
        clamp_reference_point: bool | None = None,
        threshold: float | None = None,
        noise: float | None = None,
        probability_weighting: str | None = None,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        check_choice("loss.view", view, VIEWS)
        check_choice("loss.reward", reward, REWARDS)
        numbers = {"beta": beta, "alpha": alpha, "loss_aversion": loss_aversion}
        checked = {name: None if number is None else require_positive(name, number) for name, number in numbers.items()}
        self.view, self.reward, self.value = view, reward, value_function(value, checked)
        self.beta = self.value.parameters.get("beta", 1.0)
        weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        point = {
            "reference_point": reference_point,
            "reference_point_steps": reference_point_steps,
            "clamp_reference_point": clamp_reference_point,
        }
        if view == "pairs":
            _require_null("view=pairs, whose reference point is the rejected completion", **weights, **point)
        if view != "scored":
            _require_null(f"view={view}, which has no scores", threshold=threshold)
        self.threshold = 0.0 if threshold is None else require_between("threshold", threshold, -math.inf, open_low=True)
        self.weights = {name: 1.0 if w is None else require_weight(name, w) for name, w in weights.items()}
        counted = "auto" in self.weights.values()
        if counted and view == "scored":
            raise ValueError("loss.desirable_weight: expected a number with loss.view=scored, found auto")
        self.point_name = reference_point or "mismatched"
        self.reference_point = (
            None if view == "pairs" else self._make_point(reference_point_steps, clamp_reference_point)
        )
        self.right, self.wrong = _odds(noise, probability_weighting)
        self.needs = Needs(reference="ratio" in reward, label_counts=counted, moves=self._moves())
        if self.reference_point is not None:
            self.needs |= replace(self.reference_point.needs, moves=self.needs.moves)

    def _make_point(self, steps: int | None, clamp: bool | None) -> ReferencePoint:
        name, has_reference = self.point_name, "ratio" in self.reward
        check_choice("loss.reference_point", name, REFERENCE_POINTS)
        # These points are, or stand for, the KL divergence of whole replies: they fit neither rewards without a
        # reference nor rewards per token.
        wrong = () if self.reward == "log_ratio" else ("policy",) if has_reference else ("zero", "token", "policy")
        if name in wrong:
            fitting = ", ".join(point for point in REFERENCE_POINTS if point not in wrong)
            raise ValueError(f"loss.reference_point: expected {fitting} with loss.reward={self.reward}, found {name}")
        return make_reference_point(name, clamp=has_reference if clamp is None else clamp, steps=steps)

    def _moves(self) -> tuple[int | None, int | None]:
        # A formula may have no slope at 0, or a negative one.
        rises = float(self.value.slope(torch.zeros((), dtype=torch.float64))) > 0
        return (1, -1) if rises else (None, None)

    def see_labels(self, desirable: float, undesirable: float) -> None:
        # A run calls this twice. In the second call, from the Trainer, the weights are already numbers.
        if "auto" not in self.weights.values():
            return
        weights = kto_weights(**self.weights, n_d=desirable, n_u=undesirable)
        self.weights = dict(zip(self.weights, weights, strict=True))
        message = "HALO weights from %g desirable and %g undesirable completions: λ_D = %.4g, λ_U = %.4g"
        log.info(message, desirable, undesirable, *weights)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs | None) -> Output:
        if self.reward.startswith("mean"):
            policy, reference = _per_token(policy), None if reference is None else _per_token(reference)
        # Without a reference r is log π_θ.
        log_ref = torch.zeros_like(policy.sum) if reference is None else reference.sum
        r, metrics = policy.sum - log_ref, dict[str, Mean]()
        if self.reference_point is None:
            u, branches = r[:, 0] - r[:, 1], 2
        else:
            z0, metrics = self.reference_point(batch, policy, log_ref)
            u, branches = r[:, 0] - z0.detach(), 1
        good, sizes = self._labels(batch, u)
        return Output(
            {"halo": self.per_example(sizes * self.losses(u, good), batch)}, self.beta * r[:, :branches], metrics
        )

    def losses(self, u: Tensor, good: Tensor) -> Tensor:
        """Return :func:`halo_loss` of gains u [B] with the parameters of this objective."""
        # The weights are numbers here: see_labels() has replaced "auto" before the first step.
        weights = {name: float(weight) for name, weight in self.weights.items()}
        odds = {"right": self.right, "wrong": self.wrong}
        return halo_loss(u, good, self.value, constant=self.value.constant, **weights, **odds)

    def _labels(self, batch: Batch, u: Tensor) -> tuple[Tensor, Tensor | float]:
        # Whether each completion is desirable, and how many labels it stands for.
        if batch.scores is not None and self.view == "scored":
            scores = as_like(batch.scores, u) - self.threshold
            return scores > 0, scores.abs()
        # The gain of a pair is that of its chosen completion.
        return torch.ones_like(u, dtype=torch.bool) if batch.desirable is None else batch.desirable, 1.0

    def end_step(self) -> None:
        if self.reference_point is not None:
            self.reference_point.end_step()


def _per_token(logprobs: LogProbs) -> LogProbs:
    # Sums over tokens become means: of log-probs, and of the divergence that an estimator of z₀ may read.
    counts = logprobs.count[..., None]
    divergence = None if logprobs.divergence is None else logprobs.divergence / counts
    return LogProbs(logprobs.tokens / counts, logprobs.mask, divergence=divergence)


def _odds(noise: float | None, weighting: str | None) -> tuple[float, float]:
    # The weights of the cases that a label is right and that it is wrong.
    check_choice("loss.probability_weighting", weighting or "none", WEIGHTINGS)
    if noise is None:
        if weighting is not None:
            raise ValueError(f"loss.probability_weighting: expected null without loss.noise, found {weighting}")
        return 1.0, 0.0
    noise, weigh = require_between("noise", noise, 0.0, 0.5, open_low=True), WEIGHTINGS[weighting or "none"]
    return weigh(1 - noise), weigh(noise)


def _require_null(because: str, **values: object) -> None:
    for name, value in values.items():
        if value is not None:
            raise ValueError(f"loss.{name}: expected null with loss.{because}, found {value!r}")
