"""What a judge answers: how good a completion is, and which of two is better."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence

from halos.data.records.record import Prompt

Said = tuple[Prompt, str]
"""A prompt and a completion."""
Duel = tuple[Prompt, str, str]
"""A prompt and two completions."""


class CompletionJudge(ABC):
    """Scores completions; a better one has a higher score. None stands where the judge gave no answer.

    Args:
        threshold: completions from this score on are desirable; None: those above the median of what is labelled.
    """

    asks_twice: bool = False
    """Whether scores are other questions than duels are, which would cost as much again."""

    def __init__(self, *, threshold: float | None = None) -> None:
        self.threshold = threshold

    @property
    def labels_are_absolute(self) -> bool:
        """Whether a label does not depend on what else is labelled."""
        return self.threshold is not None

    def check(self) -> None:  # noqa: B027 (most judges have nothing to load)
        """Raise ``ValueError`` for a model that cannot be asked; loads no weights."""

    @abstractmethod
    def scores(self, said: Sequence[Said]) -> list[float | None]:
        """The score of each completion."""

    def verdicts(self, duels: Sequence[Duel]) -> list[float | None]:
        """For each duel 1 if the first completion is better, 0 if the second is, 0.5 for a tie."""
        sides = [[(prompt, text) for prompt, *texts in duels for text in (texts[side],)] for side in (0, 1)]
        return [
            None if a is None or b is None else (0.5 if a == b else float(a > b))
            for a, b in zip(*(self.scores(side) for side in sides), strict=True)
        ]

    def labels(self, said: Sequence[Said]) -> list[bool | None]:
        """Whether each completion is desirable."""
        scores = self.scores(said)
        known = [score for score in scores if score is not None]
        if self.threshold is None and known:
            middle = statistics.median(known)
            return [None if score is None else score > middle for score in scores]
        return [None if score is None else score >= (self.threshold or 0.0) for score in scores]

    def report(self) -> dict[str, float]:
        """What asking took: questions, refusals, tokens, cost."""
        return {}
