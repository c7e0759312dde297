"""True rewards: worlds in which it is known whether a completion is good."""

from __future__ import annotations

from typing import Protocol


class TrueReward(Protocol):
    """The true reward of a data source whose world is known, as the toy world's is."""

    def reward(self, prompt: str, completion: str) -> float:
        """How good the completion is."""
        ...

    def desirable(self, prompt: str, completion: str) -> bool:
        """Whether people would want it."""
        ...

    def prompts(self, size: int) -> list[str]:
        """So many held-out prompts, always the same ones."""
        ...
