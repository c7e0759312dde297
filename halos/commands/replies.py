"""Plans the replies that a run samples at its validations: to which prompts, how often, and whether for the KL."""

from __future__ import annotations

import logging
import math

import lightning.pytorch as pl
import numpy as np
from omegaconf import DictConfig, OmegaConf

from halos.commands.judge import make_judge
from halos.config.combinations import values_of
from halos.data.module import PreferenceDataModule
from halos.data.rows.token_rows import Row
from halos.data.sources.base import Source
from halos.data.store.table import Stored
from halos.judges.base import CompletionJudge
from halos.judges.truth import TruthJudge
from halos.loop.reference_point import PolicyKL
from halos.objectives.base import Objective
from halos.processes.collectives import data_ranks
from halos.processes.first import on_first_process
from halos.reporting.kl_reference import missing_reference
from halos.reporting.replies import SampledReplies
from halos.sampling.budget import PASSES, sampling_plan, validation_cost
from halos.sharding.factory import BackboneFactory

log = logging.getLogger(__name__)

COUNTED_ROWS = 256
"""The number of rows whose completions are used to estimate the length of replies."""


def make_replies(
    cfg: DictConfig, objective: Objective, data: PreferenceDataModule, model: BackboneFactory, *, kl: bool
) -> SampledReplies:
    """Make the callback that samples replies; :func:`plan_replies` completes it."""
    sampling = cfg.sampling
    size = max(sampling.prompts, sampling.kl_prompts if kl else 0)
    prompts = data.prepared.prompts[: size if objective.generates else 0]
    judge = _win_rate_judge(cfg, data.preparation.source) if kl else None
    return SampledReplies(
        data.preparation.tokens(model.tokenizer),
        prompts,
        shown=sampling.prompts,
        max_new_tokens=sampling.max_new_tokens,
        seed=cfg.seed,
        verdicts=None if judge is None else judge.verdicts,
        reference_moves=bool(cfg.reference_sync.every),
    )


def _win_rate_judge(cfg: DictConfig, source: Source) -> CompletionJudge | None:
    wanted, node = cfg.sampling.win_rate, cfg.get("judge")
    if wanted is False:
        return None
    if wanted is True and node is None:
        hint = "set judge=truth, judge=reward_model or judge=chat"
        raise ValueError(f"sampling.win_rate: expected auto or false without a judge, found true; {hint}")
    # The judge of rounds may cost money, and was chosen for labelling only.
    if node is not None and (wanted is True or not values_of(cfg)["rounds"]):
        device = "cpu" if cfg.trainer.accelerator == "cpu" else "auto"
        precision = "bf16-true" if cfg.precision == "bf16-true" else "32-true"
        return make_judge(node, source, device=device, precision=precision, progress=False)
    reward = source.true_reward()
    return None if reward is None else TruthJudge(reward)


def measures_kl(cfg: DictConfig, objective: Objective, model: BackboneFactory) -> bool:
    """Return whether the run measures its KL. If its reference is not available, log the reason."""
    sampling = cfg.sampling
    if not (sampling.kl and sampling.kl_prompts and objective.generates) or cfg.strategy.name == "deepspeed":
        return False
    live = objective.needs.reference and model.spec.reference == "live"
    reason = missing_reference(model.spec, live=live)
    if reason is not None and on_first_process():
        log.info("sampling.kl: left out, as %s", reason)
    return reason is None


def plan_replies(
    cfg: DictConfig,
    replies: SampledReplies,
    trainer: pl.Trainer,
    objective: Objective,
    data: PreferenceDataModule,
    *,
    kl: bool,
) -> None:
    """Choose the validations that sample, once the steps are planned, and write their number into the configuration."""
    if not replies.prompts:
        return
    control = objective.control(True)
    prompts = [len(replies.tokens.fitted_prompt(prompt, control)) for prompt in replies.prompts]
    cost = validation_cost(prompts, _lengths(data, cfg.sampling.max_new_tokens), kl=kl)
    replies.plan = sampling_plan(
        validation_steps(trainer, data),
        cfg.sampling.validations,
        cost=cost,
        trained_tokens=trained_tokens(trainer, data),
        prompts=len(prompts),
        kl=kl,
    )
    if replies.plan.validations:
        OmegaConf.update(cfg, "sampling.validations", len(replies.plan.steps))


def report_refreshes(cfg: DictConfig, trainer: pl.Trainer, objective: Objective, data: PreferenceDataModule) -> None:
    """Log how often the policy is sampled for a loss's reference point, and what it costs."""
    if not objective.needs.samples or not on_first_process():
        return
    steps = min(module.steps for module in objective.modules() if isinstance(module, PolicyKL))
    size, sampling = cfg.sampling.kl_prompts, cfg.sampling
    rows = _counted_rows(data)
    prompts = [len(rows[number % len(rows)].prompt) for number in range(size)]
    cost = validation_cost(prompts, _lengths(data, sampling.max_new_tokens), kl=True)
    share = cost * -(-data.steps // steps) / (PASSES * trained_tokens(trainer, data))
    message = "z₀ from replies to %d prompts every %d steps (about %.0f%% of training's computation)"
    log.info(message, size, steps, 100 * share)


def _lengths(data: PreferenceDataModule, longest: int) -> list[int]:
    return [min(len(row.branches[0]), longest) for row in _counted_rows(data)]


def _counted_rows(data: PreferenceDataModule) -> list[Row]:
    rows = data.rows.get("val", data.rows.get("train"))
    table = None if rows is None else rows.table
    if isinstance(table, Stored):
        return table.many(np.arange(min(len(table), COUNTED_ROWS)))
    return [data.prepared.example()]


def trained_tokens(trainer: pl.Trainer, data: PreferenceDataModule) -> int:
    """Return the tokens that training reads, on all devices."""
    if not data.streams:
        return data.tokens_in(data.steps)
    # The tokens of a stream are not known beforehand: its first example stands for all.
    row = data.prepared.example()
    tokens = len(row.prompt) + sum(map(len, row.branches))
    return data.steps * data.batch_size * trainer.accumulate_grad_batches * trainer.world_size * tokens


def validation_steps(trainer: pl.Trainer, data: PreferenceDataModule) -> list[int]:
    """Return the optimizer steps after which the policy is validated."""
    if "val" not in data.rows:
        return []
    interval = int(trainer.val_check_interval) // trainer.accumulate_grad_batches
    return [*range(0, data.steps, interval), data.steps]


def validation_plan(trainer: pl.Trainer, data: PreferenceDataModule) -> tuple[int, int, float]:
    """Return the number of validations, the examples of each, and their computation as a share of training's."""
    validations = validation_steps(trainer, data)
    if not validations:
        return 0, 0, 0.0
    rows = data.rows["val"].table
    batches = math.ceil(len(rows) / (data.batch_size * data_ranks(trainer)[1]))
    # Lightning's limit: a number of batches, or a share of them.
    limit = trainer.limit_val_batches
    read = min(limit / batches, 1.0) if isinstance(limit, int) else limit
    share = len(validations) * read * int(rows.tokens().sum()) / (PASSES * trained_tokens(trainer, data))
    return len(validations), round(read * len(rows)), share
