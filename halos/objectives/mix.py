"""Mix: a weighted sum of several objectives over the same batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from typing import Unpack

from torch import nn

from halos.config.parameters import require_between
from halos.config.signatures import check_arguments
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Mean, Needs, Objective, Output

Part = Callable[..., Objective]
"""A subclass of :class:`Objective`, or a ``functools.partial`` of one, that is called with a backbone."""


class Mix(Objective):
    """A weighted sum of losses over the same batch, Σ_i w_i L_i, such as DPO plus SFT on the chosen completion.

    All parts take the same view, with one exception: a part on demonstrations can be mixed with parts on pairs, and
    then takes the chosen completion. Loss terms and metrics are named after their part. The logged rewards are those of
    the first part that has any. ``humanline`` clamps the log-probs for the parts that have a reference. Modules outside
    the backbone, such as a critic, share one gradient-norm limit: the smallest of the parts' limits.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        parts: objective classes, or ``functools.partial`` of them, by name.
        weights: the weight of each part, 0 or more.

    Raises:
        ValueError: for parts that cannot share a batch, for parameters that a part does not take, and for weights whose
            names are not those of the parts.
    """

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        parts: Mapping[str, Part],
        weights: Mapping[str, float],
        **options: Unpack[LoopOptions],
    ) -> None:
        # Each part clamps log-probs for itself: parts without a reference must get them unclamped.
        humanline = options.pop("humanline", None)
        super().__init__(backbone, **options)
        self.weights = _weights(parts, weights)
        objectives = {name: _objective(name, part) for name, part in parts.items()}
        self.view = _common_view({name: part.view for name, part in objectives.items()})
        self.needs = _united_needs({name: part.needs for name, part in objectives.items()})
        self.own_clip = min((part.own_clip for part in objectives.values() if part.own_clip), default=None)
        if humanline is not None and not self.needs.reference:
            raise ValueError(f"humanline.enabled: expected a part with a reference, found {', '.join(objectives)}")
        for part in objectives.values():
            part.humanline = humanline if part.needs.reference else None
        self.parts = nn.ModuleDict(objectives)

    def build(self, hidden_size: int) -> None:
        for _, part in self._named_parts():
            part.build(hidden_size)

    def see_labels(self, desirable: float, undesirable: float) -> None:
        for _, part in self._named_parts():
            part.see_labels(desirable, undesirable)

    def end_step(self) -> None:
        for _, part in self._named_parts():
            part.end_step()

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs | None) -> Output:
        loss, metrics, rewards = dict[str, Mean](), dict[str, Mean](), None
        for name, part in self._named_parts():
            # outcome(), not compute(): a part with a reference applies humanline's clamp itself.
            output = part.outcome(batch, policy, reference if part.needs.reference else None)
            for term, mean in output.loss.items():
                # A part's only term is named after the part. Weights scale the total of a mean and leave its counts.
                key = name if len(output.loss) == 1 else f"{name}/{term}"
                loss[key] = self.weights[name] * mean
            metrics |= {f"{name}/{metric}": mean for metric, mean in output.metrics.items()}
            rewards = output.rewards if rewards is None else rewards
        return Output(loss, rewards, metrics)

    def _named_parts(self) -> list[tuple[str, Objective]]:
        # All parts are objectives; isinstance only restores the type, which nn.ModuleDict loses.
        return [(name, part) for name, part in self.parts.items() if isinstance(part, Objective)]


def _weights(parts: Mapping[str, Part], weights: Mapping[str, float]) -> dict[str, float]:
    if not parts or parts.keys() != weights.keys():
        expected, found = (", ".join(names) or "none" for names in (parts, weights))
        raise ValueError(f"loss.weights: expected one for each of loss.parts ({expected}), found {found}")
    return {name: require_between(f"weights.{name}", weight, 0.0) for name, weight in weights.items()}


def _objective(name: str, part: Part) -> Objective:
    key = f"loss.parts.{name}"
    if not callable(part):
        raise ValueError(f"{key}: expected an objective, found {part!r}; in YAML it needs _partial_: true")
    # Without a backbone: the mixture trains its own, and the parts only compute losses.
    check_arguments(key, part, None)
    objective = part(None)
    if not isinstance(objective, Objective):
        raise ValueError(f"{key}: expected an objective, found {type(objective).__name__}")
    if objective.control(True) or not objective.generates:
        what = "control tokens" if objective.generates else "scores in place of log-probs"
        raise ValueError(f"{key}: {type(objective).__name__} has {what}, which no other part could share")
    return objective


def _united_needs(needs: Mapping[str, Needs]) -> Needs:
    # With last_hidden, token log-probs have no gradient: a part that learns from those would silently learn nothing.
    if len({need.last_hidden for need in needs.values()}) > 1:
        names = ", ".join(name for name, need in needs.items() if need.last_hidden)
        raise ValueError(f"loss.parts: expected all parts to need last_hidden or none, found only {names}")
    return reduce(or_, needs.values())


def _common_view(views: Mapping[str, str]) -> str:
    kinds = set(views.values())
    if kinds == {"demonstrations", "pairs"}:
        return "pairs"
    if len(kinds) != 1:
        listed = ", ".join(f"{name}: {view}" for name, view in views.items())
        expected = "parts with one view (demonstrations can be the chosen side of pairs)"
        raise ValueError(f"loss.parts: expected {expected}, found {listed}")
    return kinds.pop()
