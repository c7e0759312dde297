"""Feedback on a policy's own samples, with the validation data of the source that the prompts came from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import final

from halos.checks import check_whole
from halos.data.records.split import split_by_prompt
from halos.data.records.truth import TrueReward
from halos.data.sources.base import Records, Source
from halos.data.sources.feedback_files import FeedbackFiles


@final
class OnPolicySource(Source):
    """Training records from a file of judged samples; validation data and true reward from another source.

    Args:
        feedback: a file in this project's format, as ``scripts/label.py`` writes it.
        world: the source of the prompts.
        val_size: records held out of the training data of ``world`` where it has no validation data of its own.
        seed: draws them. With the same size and seed they are those that were held out when ``world`` was trained on.
    """

    name = "on_policy"

    def __init__(self, *, feedback: str | Path, world: Source, val_size: int = 0, seed: int = 0) -> None:
        check_whole("data.val_size", val_size, 0)
        self._feedback, self._world = FeedbackFiles(feedback), world
        self._val_size, self._seed = val_size, seed

    def train(self) -> Records:
        return self._feedback.train()

    def val(self) -> Records | None:
        validation = self._world.val()
        if validation is not None or not self._val_size:
            return validation
        # The split depends on prompts and seed alone, so these are the prompts that no earlier run has trained on.
        records = self._world.train().records
        return Records(split_by_prompt(records, self._val_size, self._seed)[1], Counter())

    def true_reward(self) -> TrueReward | None:
        return self._world.true_reward()
