"""Samples the policy at validations: its KL to the reference, the length of replies, and a few of them to read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from halos.data.records.record import Prompt
from halos.data.rows.chat_tokens import ChatTokens
from halos.objectives.base import Objective
from halos.reporting.kl_reference import NoRoomError
from halos.reporting.policy_replies import policy_replies
from halos.reporting.tensorboard import log_text
from halos.safe_text import markdown_block
from halos.sampling.budget import SamplingPlan
from halos.sampling.replies import Reply, reply_metrics

log = logging.getLogger(__name__)

STALE = ("val/kl", "val/kl_per_token", "val/kl_error", "val/samples/length", "val/samples/truncated")
"""Metrics of sampled validations, which the others must not repeat."""


class SampledReplies(Callback):
    """Measures the policy by its own replies at the validations that a plan names, and after the last step.

    Each prompt of each validation has random numbers of its own, which depend on the seed, the step and the prompt
    alone. So replies are the same on any number of ranks and in a resumed run.

    Args:
        tokens: tokenises prompts as training does.
        prompts: the prompts; none for no samples.
        shown: the number of prompts, the first ones, whose replies are logged as text.
        max_new_tokens: the longest reply.
        seed: of the random numbers.

    Attributes:
        plan: which validations sample; None: all do, without the KL.
        metrics: of the last sampled validation.
    """

    def __init__(
        self, tokens: ChatTokens, prompts: Sequence[Prompt], *, shown: int, max_new_tokens: int, seed: int
    ) -> None:
        self.tokens, self.prompts, self.shown = tokens, list(prompts), shown
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.plan: SamplingPlan | None = None
        self.metrics: dict[str, float] = {}
        self._no_room = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning keeps what an earlier validation has logged.
        for name in STALE:
            trainer.callback_metrics.pop(name, None)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning passes any module, also a user's own that has no policy to sample.
        if self.prompts and isinstance(pl_module, Objective) and self._is_due(trainer):
            self.measure(trainer, pl_module)
            pl_module.log_dict({f"val/{name}": value for name, value in self.metrics.items()})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Without validations the prompts are those of training, and the end is measured alone.
        if self.plan is not None and not self.plan.validations and self.prompts and isinstance(pl_module, Objective):
            self.measure(trainer, pl_module)
            named = {f"val/{name}": value for name, value in self.metrics.items()}
            for logger in trainer.loggers:
                logger.log_metrics(named, trainer.global_step)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        # A run that trainer.max_time has stopped validates once more, after a step that no plan knows.
        at_the_end = trainer.state.fn == "validate" and trainer.global_step > 0
        return self.plan is None or at_the_end or trainer.global_step in self.plan.steps

    def measure(self, trainer: pl.Trainer, objective: Objective) -> None:
        """Sample replies, set :attr:`metrics`, and log the first replies as text. All ranks call it together."""
        numbers = range(len(self.prompts))
        # The reference reads no control token, as nothing was trained with one when training started.
        ours, theirs = (self._prompt_ids(numbers, control) for control in (objective.control(True), ""))
        draw = partial(policy_replies, trainer, objective, self.tokens, [*zip(ours, theirs, strict=True)])
        seed = (self.seed * 1_000_003 + trainer.global_step) % 2**63
        options = {"max_new_tokens": self.max_new_tokens, "seed": seed}
        try:
            replies = draw(**options, kl=self.plan is not None and self.plan.kl and not self._no_room)
        except NoRoomError as error:
            self._no_room = True
            log.warning("sampling.kl: left out, as %s", error)
            replies = draw(**options, kl=False)
        self.metrics = reply_metrics(replies)
        if self.shown and trainer.is_global_zero:
            log_text(trainer, "samples", [self._text(objective, reply) for reply in replies[: self.shown]])

    def _prompt_ids(self, numbers: Sequence[int], control: str) -> list[list[int]]:
        return [self.tokens.fitted_prompt(self.prompts[number], control) for number in numbers]

    def _text(self, objective: Objective, reply: Reply) -> str:
        (prompt,) = self._prompt_ids([reply.prompt], objective.control(True))
        shown, text = (markdown_block(str(self.tokens.tokenizer.decode(ids))) for ids in (prompt, reply.ids))
        return f"{shown}\n\n**reply**\n\n{text}"
