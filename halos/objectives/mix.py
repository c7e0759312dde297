"""Mix: a weighted sum of several objectives in the same step, each on its own view of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Unpack

from torch import nn

from halos.config.parameters import require_between
from halos.config.signatures import check_arguments
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Mean, Needs, Objective, Output

if TYPE_CHECKING:
    from halos.data.preparation.needs import DataNeeds

Part = Callable[..., Objective]
"""A subclass of :class:`Objective`, or a ``functools.partial`` of one, that is called with a backbone."""


class Mix(Objective):
    """A weighted sum of losses in the same step, Σ_i w_i L_i, such as DPO plus SFT on the chosen completion.

    Each part takes its own view of the same records. If another part takes pairs, a part on demonstrations takes their
    chosen completions. If all parts then take the same view, an example of the mixture is an example of this view.
    Otherwise an example is a record with its examples in all views: with DPO and KTO, a record with a chosen and a
    rejected completion is one pair and two labelled completions, whose tokens the model computes once. Records of one
    prompt whose completions make a pair are joined to one.

    Each L_i is divided by the number of its own examples (or tokens) in the optimizer step, so it is the loss that the
    part would have by itself. It is 0 in a step without an example for it.

    Loss terms and metrics are named after their part. The logged rewards, and the metrics that all losses share, are
    those of the first part with rewards. ``humanline`` clamps the log-probs for the parts that have a reference.
    Modules outside the backbone, such as a critic, share one gradient-norm limit: the smallest of the parts' limits.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        parts: objective classes, or ``functools.partial`` of them, by name.
        weights: the weight of each part, 0 or more.
        data: for a part that learns only from one source of ``data=mix``, the name of that source; None: all parts
            learn from all records. A part on demonstrations with data of its own takes demonstrations, not chosen
            completions.

    Raises:
        ValueError: for parts that cannot share a forward pass, for parameters that a part does not take, for weights
            or data whose names are not those of the parts, and for automatic weights of a part with data of its own.
    """

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        parts: Mapping[str, Part],
        weights: Mapping[str, float],
        data: Mapping[str, str] | None = None,
        **options: Unpack[LoopOptions],
    ) -> None:
        # Each part clamps log-probs for itself: parts without a reference must get them unclamped.
        humanline = options.pop("humanline", None)
        super().__init__(backbone, **options)
        self.weights = _weights(parts, weights)
        objectives = {name: _objective(name, part) for name, part in parts.items()}
        views = _views({name: part.view for name, part in objectives.items()}, data or {})
        self._views = list(dict.fromkeys(views.values()))
        self._places = {name: self._views.index(view) for name, view in views.items()}
        self.view = "+".join(dict.fromkeys(view for view, _ in self._views))
        self.needs = _united_needs({name: part.needs for name, part in objectives.items()})
        self.own_clip = min((part.own_clip for part in objectives.values() if part.own_clip), default=None)
        if data and self.needs.label_counts:
            raise ValueError("loss.data: expected parts without weights of auto, which count the labels of all records")
        if humanline is not None and not self.needs.reference:
            raise ValueError(f"humanline.enabled: expected a part with a reference, found {', '.join(objectives)}")
        for part in objectives.values():
            part.humanline = humanline if part.needs.reference else None
        self.parts = nn.ModuleDict(objectives)

    def data_needs(self) -> DataNeeds:
        needs = super().data_needs()
        if self._views == [(self.view, None)]:
            return needs
        return replace(needs, views=tuple(self._needs_of(place) for place in range(len(self._views))))

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
        loss, metrics = dict[str, Mean](), dict[str, Mean]()
        rewards, rewarded = None, 0
        for name, part in self._named_parts():
            part_batch = batch.view(self._places[name])
            log_ref = reference.of(part_batch) if part.needs.reference and reference is not None else None
            # compute_clamped(), not compute(): a part with a reference applies humanline's clamp itself.
            output = part.compute_clamped(part_batch, policy.of(part_batch), log_ref)
            for term, mean in output.loss.items():
                # A part's only term is named after the part. Weights scale the total of a mean and leave its counts.
                key = name if len(output.loss) == 1 else f"{name}/{term}"
                loss[key] = self.weights[name] * mean
            metrics |= {f"{name}/{metric}": mean for metric, mean in output.metrics.items()}
            if rewards is None and output.rewards is not None:
                rewards, rewarded = output.rewards, self._places[name]
        return Output(loss, rewards, metrics, view=rewarded)

    def _needs_of(self, place: int) -> DataNeeds:
        part_needs = [part.needs for name, part in self._named_parts() if self._places[name] == place]
        view, source = self._views[place]
        return replace(self.view_needs(view, reduce(or_, part_needs)), source=source)

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
    # With last_hidden, token log-probs have no gradient: a part that learns from them would silently learn nothing.
    if len({need.last_hidden for need in needs.values()}) > 1:
        names = ", ".join(name for name, need in needs.items() if need.last_hidden)
        raise ValueError(f"loss.parts: expected all parts to need last_hidden or none, found only {names}")
    return reduce(or_, needs.values())


def _views(views: Mapping[str, str], data: Mapping[str, str]) -> dict[str, tuple[str, str | None]]:
    """Return the view that each part takes, and the source that it learns from (None: all).

    Args:
        views: the view that each part is for.
        data: the sources of the parts that have one of their own.
    """
    if others := data.keys() - views.keys():
        raise ValueError(f"loss.data: expected names among loss.parts ({', '.join(views)}), found {', '.join(others)}")
    paired = any(view == "pairs" and name not in data for name, view in views.items())
    taken = {name: "pairs" if paired and view == "demonstrations" else view for name, view in views.items()}
    return {name: (views[name], data[name]) if name in data else (view, None) for name, view in taken.items()}
