"""The true reward of a data source whose world is known, as the toy world's is."""

from __future__ import annotations

from collections.abc import Sequence

from halos.data.records.record import Prompt
from halos.data.records.truth import TrueReward
from halos.judges.base import CompletionJudge, Said


class TruthJudge(CompletionJudge):
    """A source's own judge. Raises ``ValueError`` for a source that has none."""

    def __init__(self, judge: TrueReward | None) -> None:
        super().__init__()
        if judge is None:
            raise ValueError("judge=truth: expected data whose true reward is known (data=toy); set another judge")
        self.judge = judge

    @property
    def labels_are_absolute(self) -> bool:
        return True

    def scores(self, said: Sequence[Said]) -> list[float | None]:
        return [self.judge.reward(_text(prompt), completion) for prompt, completion in said]

    def labels(self, said: Sequence[Said]) -> list[bool | None]:
        return [self.judge.desirable(_text(prompt), completion) for prompt, completion in said]


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1].content
