"""True rewards of synthetic data, whose world says whether a completion is good."""

from __future__ import annotations

from typing import Protocol


class TrueReward(Protocol):
    """The true reward of a data source whose world is known, such as the toy world's."""

    def reward(self, prompt: str, completion: str) -> float:
        """The reward of a completion, in [0, 1]."""
        ...

    def desirable(self, prompt: str, completion: str) -> bool:
        """Whether the completion is desirable."""
        ...

    def prompts(self, size: int) -> list[str]:
        """The first ``size`` held-out prompts; every call returns the same ones."""
        ...
