"""What a loss needs of data, backbone and step. A mixture unites the needs of its parts."""

from __future__ import annotations

from dataclasses import dataclass, fields

from halos.data.preparation.needs import RowNeeds

Direction = int | None
"""Sign of the first step's change of log π: 1 or -1, 0 for no change, None if the loss promises nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs(RowNeeds):
    """What a loss needs of the data (:class:`RowNeeds`), of the backbone and of the step.

    The union ``a | b`` is what a batch has to provide for both losses: a flag is true if it is true in either.

    Attributes:
        reference: log-probs under the reference. Without it no reference is loaded, computed or cached.
        hidden: the policy's hidden states, detached, in ``LogProbs.hidden`` (a value head reads them).
        whole_step: all examples of the optimizer step in one micro-step, because the loss of each depends on all
            others. This rules out gradient accumulation.
        whole_micro_step: only a declaration: the loss of an example depends on the other examples of its micro-step, on
            all ranks (KTO's z₀). Accumulated micro-batches then differ slightly from one large batch.
        divergence: the divergence between the policy's and the reference's distributions at each completion token, in
            ``LogProbs.divergence``. It needs a reference that computes in each step, live or without the adapter.
        log_collision: log Σ_v π(v)² of the policy's distribution at each completion token, in
            ``LogProbs.log_collision`` (WPO's weights).
        samples: replies of the policy in training, from which a callback measures its KL (:class:`PolicyKL`).
        label_counts: the numbers of desirable and undesirable training completions, passed to ``see_labels`` before
            the first step. A stream cannot count them.
        moves: the direction in which the first step moves log π of (desirable, undesirable) completions. The
            conformance kit checks it. ``(0, 0)`` declares a loss that does not read token log-probs.
    """

    reference: bool = True
    hidden: bool = False
    whole_step: bool = False
    whole_micro_step: bool = False
    divergence: bool = False
    log_collision: bool = False
    samples: bool = False
    label_counts: bool = False
    moves: tuple[Direction, Direction] = (1, -1)

    def __or__(self, other: Needs) -> Needs:
        # Over all fields, so that a flag added later is not forgotten here.
        flags = [field.name for field in fields(self) if field.name != "moves"]
        either = {name: getattr(self, name) or getattr(other, name) for name in flags}
        (up, down), (other_up, other_down) = self.moves, other.moves
        return Needs(**either, moves=(_sum_sign(up, other_up), _sum_sign(down, other_down)))


def _sum_sign(one: Direction, other: Direction) -> Direction:
    # The sign of a sum of two pushes. Opposite pushes are decided by their weights, which are not known here.
    if one == other or other == 0:
        return one
    return other if one == 0 else None
