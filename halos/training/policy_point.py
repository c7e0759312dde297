"""Measures the reference point that is the KL of the policy's own samples (``loss.reference_point=policy``)."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np

from halos.data.module import PreferenceDataModule
from halos.data.store.table import Stored
from halos.loop.point_refresh import PointRefresh
from halos.objectives.base import Objective
from halos.reporting.kl_reference import NoRoomError
from halos.reporting.policy_replies import Ids, policy_replies
from halos.sampling.replies import reply_metrics


class PolicyPoint(PointRefresh):
    """Refreshes the reference points that are KL(π_θ ‖ π_ref) of recent samples of the policy.

    For each refresh, prompts of training examples are drawn, so that a prompt counts as often as in training; for a
    stream, they are the prompts that validations sample. Prompts and replies depend only on the seed and the step, so
    they are the same on any number of ranks and in a resumed run.

    Args:
        prompts: the number of prompts of a refresh, with one reply each.
        max_new_tokens: the maximum number of tokens of a reply.
        seed: the seed of prompts and replies.
    """

    def __init__(self, *, prompts: int = 64, max_new_tokens: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.prompts, self.max_new_tokens, self.seed = prompts, max_new_tokens, seed

    def measure(self, trainer: pl.Trainer, objective: Objective) -> float:
        rng = random.Random(f"reference point {self.seed} {trainer.global_step}")
        data: Any = getattr(trainer, "datamodule", None)
        assert isinstance(data, PreferenceDataModule)
        tokens = data.preparation.tokens(data.prepared.tokenizer)
        prompts = [(ids, ids) for ids in _prompts(data, self.prompts, rng)]
        options = {"max_new_tokens": self.max_new_tokens, "seed": rng.getrandbits(63)}
        try:
            replies = policy_replies(trainer, objective, tokens, prompts, **options, kl=True)
        except NoRoomError as error:
            hint = "train LoRA adapters (model.lora.enabled=true), or choose another loss.reference_point than policy"
            raise ValueError(f"{error}; {hint}") from error
        return reply_metrics(replies)["kl"]


def _prompts(data: PreferenceDataModule, count: int, rng: random.Random) -> list[Ids]:
    # Token ids, as the policy reads them in training.
    rows = None if data.streams else data.rows["train"].table
    if isinstance(rows, Stored):
        return [row.prompt for row in rows.many(np.array(rng.choices(range(len(rows)), k=count)))]
    tokens = data.preparation.tokens(data.prepared.tokenizer)
    return [tokens.fitted_prompt(prompt) for prompt in rng.choices(data.prepared.prompts, k=count)]
