"""Assembles a run from its configuration: checks, data, objective, model and Trainer."""

from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from halos import terminal
from halos.commands.builders import build_callbacks, build_data, build_model, build_objective
from halos.commands.replies import make_replies, measures_kl, plan_replies, report_refreshes
from halos.config.combinations import (
    COUNTS,
    DIVERGENCE,
    GENERATES,
    REFERENCE,
    SAMPLES,
    SEVERAL_VIEWS,
    STEP_LABELS,
    WHOLE_STEP,
    check_combinations,
    values_of,
)
from halos.config.devices import build_strategy
from halos.config.nodes import build, flatten, plain
from halos.config.runs import CONFIG, saved_run
from halos.config.values import check_values
from halos.data.module import PreferenceDataModule
from halos.data.preparation.cautions import warn_of_imbalance
from halos.data.records.truth import TrueReward
from halos.data.rows.chat_tokens import ChatTokens
from halos.data.rows.rendering import today
from halos.data.streaming.module import StreamingDataModule
from halos.objectives.base import Objective
from halos.policy.export.hub import check_push
from halos.processes import ranks
from halos.processes.collectives import data_ranks
from halos.processes.first import on_first_process
from halos.processes.provenance import git_commit
from halos.reporting.board_report import BoardReport
from halos.reporting.csv_metrics import CSVMetrics
from halos.reporting.progress import Progress
from halos.reporting.replies import SampledReplies
from halos.reporting.stream_report import StreamReport
from halos.sharding.factory import BackboneFactory
from halos.training import Checkpoints, PolicyPoint, ReferenceSync, RunFolder, RunRecord
from halos.training.identity import identity
from halos.training.memory import KeepFreedMemory
from halos.training.result import check_metric
from halos.training.trainer import make_trainer, validation_interval, warn_if_emulated, warn_of_lost_steps


@dataclass(slots=True)
class Run:
    """The objects of one run, built before any weights are read and before the run's own files are written.

    ``cfg`` is completed while they are built: by the template's date, and by the number of validations that sample.
    """

    cfg: DictConfig
    folder: RunFolder
    checkpoint: Path | None
    objective: Objective
    model: BackboneFactory
    data: PreferenceDataModule
    trainer: pl.Trainer
    record: RunRecord
    replies: SampledReplies
    commit: str | None

    @property
    def tokens(self) -> ChatTokens:
        """The run's tokenizer, with its token limits."""
        return self.data.preparation.tokens(self.model.tokenizer)

    @property
    def checkpoints(self) -> Checkpoints:
        """The callback that saves the run."""
        callback = self.trainer.checkpoint_callback
        assert isinstance(callback, Checkpoints)
        return callback

    @property
    def examples_per_step(self) -> int:
        """Examples of an optimizer step, over all devices and micro-batches."""
        return self.data.batch_size * self.trainer.accumulate_grad_batches * data_ranks(self.trainer)[1]

    @property
    def identity(self) -> dict[str, object]:
        """The settings and data that a run must share with this one to resume from its checkpoints."""
        settings, keys, model = flatten(plain(self.cfg)), self.data.prepared.keys(), self.model.spec.local
        accumulate = self.trainer.accumulate_grad_batches
        return identity(settings, keys, model=model, examples_per_step=self.examples_per_step, accumulate=accumulate)


def assemble(cfg: DictConfig) -> Run:
    """Check the configuration, prepare the data and plan the steps, with cheap checks first.

    Raises ``ValueError`` for a bad configuration, bad data or a bad model.
    """
    terminal.set_up_logging()
    check_values(cfg)
    check_push(cfg.hub.push)
    if (cfg.rounds.count != 1 or cfg.get("before")) and cfg.rounds.round is None:
        raise ValueError("rounds: expected run_rounds(cfg, train) of halos.commands.rounds, found train")
    pl.seed_everything(cfg.seed, verbose=False)
    folder = RunFolder(Path(cfg.output_dir))
    checkpoint = folder.check(resume=cfg.resume, overwrite=cfg.overwrite)
    _fix_date(cfg, checkpoint)
    optim = build(cfg.optim)
    objective = build_objective(cfg, optim)
    check_combinations(values_of(cfg) | _traits(objective))
    data = build_data(cfg.data, seed=cfg.seed, cache_dir=cfg.cache_dir, cache_key_file=cfg.cache_key_file)
    reward, size = data.preparation.source.true_reward(), cfg.sampling.size
    _check_sampling(size, reward)
    samples = reward is not None and bool(size) and objective.generates
    check_metric(cfg.sweep_metric, max_kl=cfg.sweep_max_kl, samples=samples)
    objective.source = model = build_model(cfg, objective, optim)
    tokens = ChatTokens(objective.ready_tokenizer(), data.preparation.limits)
    if on_first_process():
        control = objective.control(True)
        model.spec.try_export(tokens.tokenizer, model.base, end_of_turn=tokens.end_of_turn, control=control)
    data.prepare(objective.data_needs(), tokens.tokenizer)
    if cfg.checkpoint.best is not None and "val" not in data.rows:
        raise ValueError(
            f"checkpoint.best: expected null without validation data, found {cfg.checkpoint.best}; set data.val_size"
        )
    kl = measures_kl(cfg, objective, model)
    record, replies = RunRecord(), make_replies(cfg, objective, data, model, kl=kl)
    trainer = make_trainer(
        plain(cfg.trainer),
        strategy=build_strategy(cfg.strategy),
        precision=cfg.precision,
        output_dir=cfg.output_dir,
        callbacks=_callbacks(cfg, folder, record, replies, data, objective),
        loggers=[CSVMetrics(folder.root / "metrics.csv"), *([instantiate(cfg.logger)] if cfg.logger._target_ else [])],
    )
    warn_of_lost_steps(cfg.precision, cfg.optim.lr)
    warn_if_emulated(cfg.precision, trainer.strategy.root_device)
    warn_of_imbalance(plain(cfg.loss), data.label_counts)
    _plan(trainer, objective, data, cfg.trainer)
    plan_replies(cfg, replies, trainer, objective, data, kl=kl)
    report_refreshes(cfg, trainer, objective, data)
    # Now, as the code may change while the run goes on.
    commit = git_commit() if on_first_process() else None
    return Run(cfg, folder, checkpoint, objective, model, data, trainer, record, replies, commit)


def _fix_date(cfg: DictConfig, checkpoint: Path | None) -> None:
    # A run that resumes on another day must write the date on which it began, or its prompts would change.
    if cfg.model.get("chat_template_date") is not None:
        return
    began = None if checkpoint is None else checkpoint.resolve().parent.parent
    known = began is not None and (began / CONFIG).is_file()
    # Nothing is built of that configuration, so it may name the user's own classes.
    date = saved_run(began)["model"].get("chat_template_date") if began is not None and known else None
    OmegaConf.update(cfg, "model.chat_template_date", date or today().isoformat(), force_add=True)


def _traits(objective: Objective) -> dict[str, bool]:
    # The properties of an objective that the rules of combinations test. They can depend on its parameters, so they are
    # not written in its YAML.
    return {
        REFERENCE: objective.needs.reference,
        WHOLE_STEP: objective.needs.whole_step,
        COUNTS: objective.needs.label_counts,
        DIVERGENCE: objective.needs.divergence,
        SAMPLES: objective.needs.samples,
        SEVERAL_VIEWS: bool(objective.data_needs().views),
        STEP_LABELS: any(view_needs.flags.step_labels for view_needs in objective.data_needs().each()),
        GENERATES: objective.generates,
    }


def _check_sampling(size: int, reward: TrueReward | None) -> None:
    # Draw the prompts of the final samples now: an error at the end would waste the run.
    try:
        if reward is not None and size:
            reward.prompts(size)
    except (ValueError, TypeError) as error:
        raise ValueError(f"sampling.size: {str(error).removeprefix('size: ')}") from error


def _plan(trainer: pl.Trainer, objective: Objective, data: PreferenceDataModule, node: DictConfig) -> None:
    accumulate, world_size = trainer.accumulate_grad_batches, data_ranks(trainer)[1]
    data.plan(epochs=node.max_epochs, max_steps=node.max_steps, accumulate=accumulate, world_size=world_size)
    trainer.val_check_interval = validation_interval(node.val_check_interval, steps=data.steps, accumulate=accumulate)
    objective.check(accumulate, data.label_counts)


def _callbacks(
    cfg: DictConfig,
    folder: RunFolder,
    record: RunRecord,
    replies: SampledReplies,
    data: PreferenceDataModule,
    objective: Objective,
) -> list[Callback]:
    checkpoint_options = {name: value for name, value in plain(cfg.checkpoint).items() if name != "export"}
    callbacks: list[Callback] = [KeepFreedMemory(), ranks.RecordRankAddresses()]
    if cfg.reference_sync.every:
        callbacks.append(ReferenceSync(**plain(cfg.reference_sync)))
    if objective.needs.samples:
        sampling = cfg.sampling
        options = {"prompts": sampling.kl_prompts, "max_new_tokens": sampling.max_new_tokens, "seed": cfg.seed}
        callbacks.append(PolicyPoint(**options))
    callbacks += [
        record,
        BoardReport(),
        replies,
        Checkpoints(folder.checkpoints, identity={}, record=record, **checkpoint_options),
    ]
    if isinstance(data, StreamingDataModule):
        callbacks.append(StreamReport(data, folder.root))
    callbacks += build_callbacks(cfg)
    return [*callbacks, Progress(data)] if cfg.trainer.enable_progress_bar else callbacks
