"""A weighted sum of several objectives over the same batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from halos.config.parameters import require_between
from halos.data.batches.collate import Batch
from halos.loop.humanline import Humanline
from halos.metrics import Mean
from halos.objectives.base import BackboneSource, Objective, Output
from halos.policy.logprobs.completions import LogProbs

Part = Callable[..., Objective]
"""A subclass of :class:`Objective`, or a ``functools.partial`` of one, that still wants its backbone."""


class Mix(Objective):
    """Σ weight · loss of the parts, for example DPO + SFT on the chosen.

    All parts see the same batch: they have the same view, or one of demonstrations beside pairs, which reads the chosen
    side. Loss terms and metrics bear the part's name; the logged rewards are those of the first part that has any.
    ``humanline`` clamps for the parts that have a reference. Modules beside the backbone (a critic) share one gradient
    clip, the smallest that a part asks for.

    Args:
        parts: objectives by name, without a backbone.
        weights: weight of each part, from 0 on.

    Raises ``ValueError`` for parts that cannot share a batch, and for weights that name other parts.
    """

    def __init__(
        self,
        backbone: BackboneSource,
        *,
        parts: Mapping[str, Part],
        weights: Mapping[str, float],
        humanline: Humanline | None = None,
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        self.weights = _weights(parts, weights)
        made = {name: _made(name, make, humanline) for name, make in parts.items()}
        self.view = _common_view({name: part.view for name, part in made.items()})
        self.needs_reference = any(part.needs_reference for part in made.values())
        self.mismatched = any(part.mismatched for part in made.values())
        self.needs_hidden = any(part.needs_hidden for part in made.values())
        self.grouped = any(part.grouped for part in made.values())
        self.needs_label_counts = any(part.needs_label_counts for part in made.values())
        self.couples_step = any(part.couples_step for part in made.values())
        self.couples_micro_step = any(part.couples_micro_step for part in made.values())
        self.own_clip = min((part.own_clip for part in made.values() if part.own_clip), default=None)
        if humanline is not None and not self.needs_reference:
            raise ValueError(f"humanline.enabled: expected a part with a reference, found {', '.join(made)}")
        self.parts = nn.ModuleDict(made)

    def build(self, hidden_size: int) -> None:
        for _, part in self._named_parts():
            part.build(hidden_size)

    def see_labels(self, desirable: int, undesirable: int) -> None:
        for _, part in self._named_parts():
            part.see_labels(desirable, undesirable)

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs | None) -> Output:
        mixed = Output(loss={}, metrics={})
        for name, part in self._named_parts():
            output = part.outcome(batch, policy, reference if part.needs_reference else None)
            weighted = {term: _scaled(mean, self.weights[name]) for term, mean in output.loss.items()}
            mixed.loss = {**mixed.loss, **_named(name, weighted)}
            mixed.metrics = {**mixed.metrics, **{f"{name}/{metric}": mean for metric, mean in output.metrics.items()}}
            mixed.rewards = output.rewards if mixed.rewards is None else mixed.rewards
        return mixed

    def _named_parts(self) -> list[tuple[str, Objective]]:
        return [(name, part) for name, part in self.parts.items() if isinstance(part, Objective)]


def _weights(parts: Mapping[str, Part], weights: Mapping[str, float]) -> dict[str, float]:
    if not parts or parts.keys() != weights.keys():
        raise ValueError(
            f"loss.weights: expected one for each of loss.parts ({', '.join(parts) or 'none'}), found "
            f"{', '.join(weights) or 'none'}"
        )
    return {name: require_between(f"weights.{name}", weight, 0.0) for name, weight in weights.items()}


def _made(name: str, make: Part, humanline: Humanline | None) -> Objective:
    if not callable(make):
        raise ValueError(f"loss.parts.{name}: expected an objective, found {make!r}; in YAML it needs _partial_: true")
    try:
        part = make(_no_backbone)
    except TypeError as error:
        raise ValueError(f"loss.parts.{name} does not take these parameters: {error}") from error
    if not isinstance(part, Objective):
        raise ValueError(f"loss.parts.{name}: expected an objective, found {type(part).__name__}")
    if part.control(True) or not part.generates:
        what = "control tokens" if part.generates else "scores in place of log-probs"
        raise ValueError(f"loss.parts.{name}: {type(part).__name__} has {what}, which no other part could share")
    part.humanline = humanline if part.needs_reference else None
    return part


def _no_backbone() -> Any:
    raise ValueError("expected the mixture's backbone to be used, not a part's")


def _common_view(views: Mapping[str, str]) -> str:
    kinds = set(views.values())
    if kinds == {"demonstrations", "pairs"}:
        return "pairs"
    if len(kinds) != 1:
        found = ", ".join(f"{name}: {view}" for name, view in views.items())
        raise ValueError(
            f"loss.parts: expected parts with one view (demonstrations can be the chosen side of pairs), found {found}"
        )
    return kinds.pop()


def _scaled(mean: Mean, weight: float) -> Mean:
    return Mean(weight * mean.total, mean.count, mean.step_count)


def _named(part: str, terms: Mapping[str, Mean]) -> dict[str, Mean]:
    # A part's only term needs no name of its own.
    return {part if len(terms) == 1 else f"{part}/{name}": mean for name, mean in terms.items()}
