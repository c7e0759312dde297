"""True rewards, of data sources that know whether a completion is good."""

from __future__ import annotations

from typing import Protocol


class TrueReward(Protocol):
    """The true reward of a data source such as the toy world."""

    def reward(self, prompt: str, completion: str) -> float:
        """Return how good the completion is."""
        ...

    def desirable(self, prompt: str, completion: str) -> bool:
        """Return whether people would call the completion desirable."""
        ...

    def prompts(self, size: int) -> list[str]:
        """Return ``size`` held-out prompts, the same ones every time."""
        ...
