"""What a loss needs of the data: its view, and flags of its token rows, to which the loop's ``Needs`` adds others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class RowNeeds:
    """What a loss needs of the token rows and of the batches that are made of them.

    Attributes:
        mismatched: another prompt's completion as each example's last branch (KTO's y'). It has no gradient.
        last_hidden: the state of each completion's last token, with gradient, in ``LogProbs.last`` (a reward head
            reads it). The model then also reads the last token of completions, and token log-probs have no gradient.
        grouped: all completions of one prompt in one step, as far as the step's size allows, as for a group's baseline.
        margins: for every pair, the degree to which people preferred the chosen completion (``Batch.margins``).
        pair_scores: for every pair, people's scores of both completions, each in [0, 1].
        step_labels: labelled steps of completions as examples, in addition to the labelled completions.
    """

    mismatched: bool = False
    last_hidden: bool = False
    grouped: bool = False
    margins: bool = False
    pair_scores: bool = False
    step_labels: bool = False


def no_control_token(desirable: bool | None) -> str:
    """The control token of objectives that have none."""
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataNeeds:
    """What the data module has to prepare for an objective.

    Attributes:
        view: ``demonstrations``, ``binary``, ``pairs`` or ``scored``.
        flags: what the loss needs of the token rows.
        control: maps an example's label to the text that ends its prompt (CSFT's control tokens).
        source: use only the records of this source of ``data=mix``; None: of all sources.
        views: in a mixture of several views, the needs of each view. ``flags`` are then their union, and an example is
            a record with its examples in all of these views.
    """

    view: str
    flags: RowNeeds = RowNeeds()
    control: Callable[[bool | None], str] = no_control_token
    source: str | None = None
    views: tuple[DataNeeds, ...] = ()

    def key(self) -> tuple[object, ...]:
        """A key that is equal for two needs if the same rows satisfy both."""
        controls = tuple(self.control(label) for label in (True, False, None))
        # `flags` may be the loss's Needs. Their other fields, such as `reference`, make no difference to the rows.
        row_flags = tuple(getattr(self.flags, field.name) for field in fields(RowNeeds))
        return self.view, self.source, controls, row_flags, *(needs.key() for needs in self.views)

    @property
    def form(self) -> str:
        """The key in :data:`.VIEWS`: the view, or ``steps`` for the binary view with labelled steps."""
        return "steps" if self.flags.step_labels else self.view

    @property
    def name(self) -> str:
        """The view, followed by the source if only one source is used."""
        return self.view if self.source is None else f"{self.view} of {self.source}"

    def each(self) -> tuple[DataNeeds, ...]:
        """The needs of each view; only these needs if there is one view."""
        return self.views or (self,)
