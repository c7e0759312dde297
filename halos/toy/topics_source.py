"""The toy world's first edition as a source of feedback, with its true reward."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import final

from halos.data.records.truth import TrueReward
from halos.data.sources.base import Records, Source
from halos.toy.feedback import toy_feedback
from halos.toy.world import is_desirable, toy_prompts, true_reward


class TopicsJudge:
    """The true reward of the first edition."""

    def reward(self, prompt: str, completion: str) -> float:
        return true_reward(prompt, completion)

    def desirable(self, prompt: str, completion: str) -> bool:
        return is_desirable(prompt, completion)

    def prompts(self, size: int) -> list[str]:
        # Held-out prompts, the same for every run, so that win rates of different runs can be compared.
        return toy_prompts(size, seed=0, split="val")


@final
@dataclass(kw_only=True, eq=False)
class ToyTopicsSource(Source):
    """Feedback that is generated on the toy world's first edition.

    For the arguments see :func:`halos.toy.feedback.toy_feedback`.

    Validation feedback has a fixed seed, no noise and no imbalance, so that all runs are compared on the same data.
    """

    name = "toy_topics"

    size: int = 1000
    val_size: int = 128
    feedback: str = "labels"
    noise: float = 0.0
    keep_desirable: float = 1.0
    keep_undesirable: float = 1.0
    completions_per_prompt: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        options = asdict(self)
        # A fixed seed, not the run's: runs of different seeds are compared on the same validation data.
        self._val = toy_feedback(size=options.pop("val_size"), feedback=self.feedback, seed=0, split="val")
        self._train = toy_feedback(**options, split="train")

    def train(self) -> Records:
        return Records(self._train, Counter())

    def val(self) -> Records:
        return Records(self._val, Counter())

    def true_reward(self) -> TrueReward:
        return TopicsJudge()
