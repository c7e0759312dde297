"""A judge that answers with the true reward of synthetic data, such as the toy world's."""

from __future__ import annotations

from collections.abc import Sequence

from halos.data.records.record import last_turn, reply_text
from halos.data.records.truth import TrueReward
from halos.judges.base import CompletionJudge, PromptCompletion


class TruthJudge(CompletionJudge):
    """Scores completions by a data source's true reward.

    Args:
        true_reward: the true reward of the data source, or None if it has none.

    Raises:
        ValueError: the data source has no true reward.
    """

    def __init__(self, true_reward: TrueReward | None) -> None:
        super().__init__()
        if true_reward is None:
            raise ValueError(
                "judge=truth: expected data whose true reward is known (data=toy), found data without one; "
                "set another judge"
            )
        self.true_reward = true_reward

    @property
    def labels_are_absolute(self) -> bool:
        return True

    # A known world judges the answer to one question. Earlier turns, such as a system prompt, are not part of it.

    def scores(self, completions: Sequence[PromptCompletion]) -> list[float | None]:
        return [self.true_reward.reward(last_turn(prompt), reply_text(reply)) for prompt, reply in completions]

    def labels(self, completions: Sequence[PromptCompletion]) -> list[bool | None]:
        # The world's own label, not a threshold on its reward.
        return [self.true_reward.desirable(last_turn(prompt), reply_text(reply)) for prompt, reply in completions]
