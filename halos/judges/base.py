"""The interface of judges: a score for a completion, and a verdict on two."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence

from halos.data.records.record import Prompt, Reply

PromptCompletion = tuple[Prompt, Reply]
"""A prompt and a completion."""
Duel = tuple[Prompt, Reply, Reply]
"""A prompt and two completions."""


class CompletionJudge(ABC):
    """Scores completions; a better one has a higher score. None stands where the judge gave no answer.

    Args:
        threshold: completions with at least this score are desirable; None: those above the median of all that are
            labelled in one call.

    Raises:
        ValueError: the threshold is not a number.
    """

    asks_twice: bool = False
    """Whether scores need other requests than duels do, at the same cost again."""

    def __init__(self, *, threshold: float | None = None) -> None:
        if threshold is not None and (type(threshold) not in (int, float) or not math.isfinite(threshold)):
            raise ValueError(f"judge.threshold: expected a number or null, found {threshold!r}")
        self.threshold = threshold

    @property
    def labels_are_absolute(self) -> bool:
        """Whether a label does not depend on the other completions that are labelled with it."""
        return self.threshold is not None

    def check(self) -> None:  # noqa: B027 (most judges have nothing to load)
        """Check that the judge can answer, without loading weights.

        Raises:
            ValueError: it cannot.
        """

    @abstractmethod
    def scores(self, completions: Sequence[PromptCompletion]) -> list[float | None]:
        """The score of each completion."""

    def verdicts(self, duels: Sequence[Duel]) -> list[float | None]:
        """For each duel 1 if the first completion is better, 0 if the second is, 0.5 for a tie."""
        first = self.scores([(prompt, text) for prompt, text, _ in duels])
        second = self.scores([(prompt, text) for prompt, _, text in duels])
        return [_verdict(a, b) for a, b in zip(first, second, strict=True)]

    def labels(self, completions: Sequence[PromptCompletion]) -> list[bool | None]:
        """Whether each completion is desirable."""
        scores = self.scores(completions)
        answered = [score for score in scores if score is not None]
        if self.threshold is None and answered:
            # Strictly above: with few distinct scores, as of ratings, most completions may lie on the median itself.
            median = statistics.median(answered)
            return [None if score is None else score > median for score in scores]
        return [None if score is None else score >= (self.threshold or 0.0) for score in scores]

    def report(self) -> dict[str, float]:
        """What the answers took so far: requests, refusals, tokens, cost."""
        return {}


def _verdict(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    return 0.5 if a == b else float(a > b)
