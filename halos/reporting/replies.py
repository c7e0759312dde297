"""Samples the policy at validations: its KL to the reference, its replies' lengths and wins, and a few to read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from halos.data.records.record import Prompt
from halos.data.rows.chat_tokens import ChatTokens
from halos.objectives.base import Objective
from halos.processes.collectives import from_rank_zero
from halos.reporting.board_report import log_first
from halos.reporting.boards import boards
from halos.reporting.kl_reference import NoRoomError
from halos.reporting.policy_replies import policy_replies
from halos.sampling.budget import SamplingPlan
from halos.sampling.replies import Reply, reply_metrics

log = logging.getLogger(__name__)

Verdicts = Callable[[Sequence[tuple[Prompt, str, str]]], list[float | None]]
"""For each prompt with two replies: 1 if the first is better, 0 if the second is, 0.5 for a tie, None for no answer."""
COLUMNS = ("prompt", "before: the reference's reply", "after: the policy's reply")

SAMPLED = ("kl", "kl_per_token", "kl_error", "samples/length", "samples/truncated", "samples/win_rate")
STALE = tuple(f"val/{name}" for name in SAMPLED)
"""Metrics of sampled validations, which other validations must not repeat."""


class SampledReplies(Callback):
    """Measures the policy by its own replies at the validations that a plan names, and after the last step.

    Each prompt of each validation has random numbers of its own, which depend only on the seed, the step and the
    prompt. So replies are the same on any number of ranks and in a resumed run.

    Args:
        tokens: tokenises prompts as training does.
        prompts: the prompts; empty for no samples.
        shown: the replies to this number of prompts, the first ones, are logged as text.
        max_new_tokens: the maximum number of tokens of a reply.
        seed: the seed of the random numbers.
        verdicts: a judge's verdicts on replies of the policy against those of the reference
            (:meth:`halos.judges.CompletionJudge.verdicts`); None: there is no judge.
        reference_moves: whether the reference, and with it its replies, changes during training.

    Attributes:
        plan: which validations sample; None: all do, without the KL.
        metrics: the metrics of the last sampled validation.
        sampled_at: the optimizer step of that validation; None: there was none yet.
    """

    def __init__(
        self,
        tokens: ChatTokens,
        prompts: Sequence[Prompt],
        *,
        shown: int,
        max_new_tokens: int,
        seed: int,
        verdicts: Verdicts | None = None,
        reference_moves: bool = False,
    ) -> None:
        self.tokens, self.prompts, self.shown = tokens, list(prompts), shown
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.verdicts, self.reference_moves = verdicts, reference_moves
        self.plan: SamplingPlan | None = None
        self.metrics: dict[str, float] = {}
        self.sampled_at: int | None = None
        self._no_room = False
        self._validated_at: int | None = None
        self._before: list[list[int]] = []  # the reference's replies

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated_at = trainer.global_step
        # Lightning would keep the metrics of an earlier validation.
        for name in STALE:
            trainer.callback_metrics.pop(name, None)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning passes any module, even a user's own without a policy to sample.
        if self.prompts and isinstance(pl_module, Objective) and self._is_due(trainer):
            self.measure(trainer, pl_module)
            pl_module.log_dict({f"val/{name}": value for name, value in self.metrics.items()})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.plan is None or not self.prompts or not isinstance(pl_module, Objective):
            return
        step = trainer.global_step
        # Without validations, the prompts come from the training data and only the end is measured. If early stopping
        # ended the run after a validation without samples, that validation need not be repeated to get them.
        if not self.plan.validations or (self._validated_at == step and self.lacks(step)):
            self.measure(trainer, pl_module)
            named = {f"val/{name}": value for name, value in self.metrics.items()}
            for logger in trainer.loggers:
                logger.log_metrics(named, step)
            log_first(trainer, named, "val/")

    def lacks(self, step: int) -> bool:
        """Whether validations sample, but the one at this step has not, as when a run ends earlier than planned."""
        planned = self.plan is not None and bool(self.plan.validations and self.plan.steps)
        return planned and bool(self.prompts) and self.sampled_at != step

    def _is_due(self, trainer: pl.Trainer) -> bool:
        # A run that trainer.max_time has stopped validates once more, after a step that is not in the plan.
        at_the_end = trainer.state.fn == "validate" and trainer.global_step > 0
        return self.plan is None or at_the_end or trainer.global_step in self.plan.steps

    def measure(self, trainer: pl.Trainer, objective: Objective) -> None:
        """Sample replies, set :attr:`metrics`, and log the first replies as text. All ranks call it together."""
        numbers = range(len(self.prompts))
        # The reference gets no control token, because it was never trained with one.
        ours, theirs = (self._prompt_ids(numbers, control) for control in (objective.control(True), ""))
        draw = partial(policy_replies, trainer, objective, self.tokens, [*zip(ours, theirs, strict=True)])
        seed = (self.seed * 1_000_003 + trainer.global_step) % 2**63
        # Drawn with the random numbers of step 0, at which both models reply alike. A resumed run draws them again.
        before = None if self._before and not self.reference_moves else self.seed * 1_000_003 % 2**63
        options = {"max_new_tokens": self.max_new_tokens, "seed": seed}
        try:
            replies = draw(**options, kl=self.plan is not None and self.plan.kl and not self._no_room, before=before)
        except NoRoomError as error:
            self._no_room = True
            log.warning("sampling.kl: left out, as %s", error)
            replies = draw(**options, kl=False)
        if all(reply.before is not None for reply in replies):
            self._before = [reply.before or [] for reply in replies]
        self.sampled_at = trainer.global_step
        self.metrics = reply_metrics(replies) | from_rank_zero(partial(self._win_rate, replies))
        shown = range(min(self.shown, len(replies)))
        for board in boards(trainer) if shown else ():
            rows = [self._row(ours[number], replies[number]) for number in shown]
            board.log_table("samples", COLUMNS, rows, trainer.global_step)

    def _win_rate(self, replies: Sequence[Reply]) -> dict[str, float]:
        if self.verdicts is None or not self._before:
            return {}
        pairs = zip(replies, self._before, strict=True)
        duels = [(self.prompts[r.prompt], self.tokens.text(r.ids), self.tokens.text(ids)) for r, ids in pairs]
        answers = [verdict for verdict in self.verdicts(duels) if verdict is not None]
        if not answers:
            log.warning("sampling.win_rate: left out, as the judge answered none of %d duels", len(duels))
        return {"samples/win_rate": fmean(answers)} if answers else {}

    def _prompt_ids(self, numbers: Sequence[int], control: str) -> list[list[int]]:
        return [self.tokens.fitted_prompt(self.prompts[number], control) for number in numbers]

    def _row(self, prompt: Sequence[int], reply: Reply) -> list[str]:
        before = self._before[reply.prompt] if self._before else []
        return [str(self.tokens.tokenizer.decode(list(ids))) if ids else "–" for ids in (prompt, before, reply.ids)]
