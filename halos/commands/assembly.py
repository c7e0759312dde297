"""Builds the objects of a run from its configuration."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from halos import terminal
from halos.config.building import SOURCE_KEYS, as_partial, build
from halos.config.combinations import COUNTS, GENERATES, REFERENCE, WHOLE_STEP, check_combinations, values_of
from halos.config.devices import build_strategy
from halos.config.flat import flatten
from halos.config.runs import run_config
from halos.config.values import check_values
from halos.data.module import PreferenceDataModule
from halos.data.records.truth import TrueReward
from halos.data.rows.chat_tokens import ChatTokens
from halos.data.rows.rendering import today
from halos.data.streaming.module import StreamingDataModule
from halos.loop.humanline import Humanline
from halos.objectives.base import Objective
from halos.optim import Optim
from halos.policy.kernels.liger import check_liger
from halos.policy.loading import ModelSpec
from halos.policy.logprobs.compiling import check_compiler
from halos.processes import ranks
from halos.processes.collectives import data_ranks
from halos.reporting.csv_metrics import CSVMetrics
from halos.reporting.data_report import StreamReport
from halos.reporting.progress import Progress
from halos.reporting.replies import SampledReplies
from halos.reporting.tensorboard import TensorBoardReport
from halos.sharding.factory import BackboneFactory
from halos.sharding.fsdp_tp import check_model
from halos.training.checkpoints import Checkpoints
from halos.training.identity import identity
from halos.training.memory import KeepFreedMemory
from halos.training.record import RunRecord
from halos.training.reference_sync import ReferenceSync
from halos.training.result import check_metric
from halos.training.run_folder import RunFolder
from halos.training.trainer import make_trainer, validation_interval, warn_if_emulated, warn_of_lost_steps

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Run:
    """The objects of one run, built before any weights are read or any file is written."""

    cfg: DictConfig
    folder: RunFolder
    checkpoint: Path | None
    objective: Objective
    model: BackboneFactory
    data: PreferenceDataModule
    trainer: pl.Trainer
    record: RunRecord = field(default_factory=RunRecord)

    @property
    def tokens(self) -> ChatTokens:
        """The run's tokenizer, with its token limits."""
        return self.data.preparation.tokens(self.model.tokenizer)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings and data that a run must share with this one to resume from its checkpoints."""
        accumulate = self.trainer.accumulate_grad_batches
        return identity(
            flatten(plain(self.cfg)),
            self.data.prepared.keys(),
            model=self.model.spec.local,
            examples_per_step=self.data.batch_size * accumulate * data_ranks(self.trainer)[1],
            accumulate=accumulate,
        )


def assemble(cfg: DictConfig) -> Run:
    """Check the configuration, prepare the data and plan the steps; cheap checks first.

    Raises ``ValueError`` for a bad configuration, bad data or a bad model.
    """
    terminal.set_up_logging()
    check_values(cfg)
    if (cfg.rounds.count != 1 or cfg.get("before")) and cfg.rounds.round is None:
        raise ValueError("rounds: expected run_rounds(cfg, train) of halos.commands.rounds, found train")
    pl.seed_everything(cfg.seed, verbose=False)
    folder = RunFolder(Path(cfg.output_dir))
    checkpoint = folder.check(resume=cfg.resume, overwrite=cfg.overwrite)
    _fix_date(cfg, checkpoint)
    optim: Optim = build(cfg.optim)
    objective = build_objective(cfg, optim)
    check_combinations(values_of(cfg) | _traits(objective))
    data = build_data(cfg.data, seed=cfg.seed, cache_dir=cfg.cache_dir)
    _check_data(cfg, objective, data)
    objective.source = model = build_model(cfg, objective, optim)
    data.prepare(objective.data_needs(), objective.ready_tokenizer())
    record = RunRecord()
    trainer = make_trainer(
        plain(cfg.trainer),
        strategy=build_strategy(cfg.strategy),
        precision=cfg.precision,
        output_dir=cfg.output_dir,
        callbacks=_callbacks(cfg, folder, record, objective, data, model),
        loggers=_loggers(cfg),
    )
    warn_of_lost_steps(cfg.precision, cfg.optim.lr)
    warn_if_emulated(cfg.precision, trainer.strategy.root_device)
    _plan(cfg, objective, data, trainer)
    return Run(
        cfg=cfg,
        folder=folder,
        checkpoint=checkpoint,
        objective=objective,
        model=model,
        data=data,
        trainer=trainer,
        record=record,
    )


def _fix_date(cfg: DictConfig, checkpoint: Path | None) -> None:
    # A run that resumes on another day has to write the date with which it began, or its prompts would be others.
    if cfg.model.get("chat_template_date") is not None:
        return
    began = None if checkpoint is None else checkpoint.resolve().parent.parent
    known = began is not None and (began / "config.yaml").is_file()
    date = run_config(began).model.get("chat_template_date") if began is not None and known else None
    OmegaConf.update(cfg, "model.chat_template_date", date or today().isoformat(), force_add=True)


def build_data(node: DictConfig, **more: Any) -> PreferenceDataModule:
    """Build the DataModule from the ``data`` node of a configuration."""
    target = {"_target_": "halos.data.StreamingDataModule"} if node.streaming else {}
    node = OmegaConf.merge(node, target)  # type: ignore[assignment]
    only_streams = ("streaming",) if node.streaming else ("streaming", "shuffle_buffer")
    data: PreferenceDataModule = build(node, without=(*SOURCE_KEYS, *only_streams), **more)
    return data


def objective_class(node: DictConfig) -> type[Objective]:
    """Return the class that ``loss`` names. Raises ``ValueError`` if it is not an objective or cannot be imported."""
    try:
        cls = get_class(node._target_)
    except Exception as error:  # Hydra raises several kinds
        raise ValueError(f"loss._target_: {node._target_} could not be imported: {error}") from error
    if not issubclass(cls, Objective):
        raise ValueError(f"loss._target_: expected a subclass of halos.objectives.Objective, found {node._target_}")
    return cls


def build_objective(cfg: DictConfig, optim: Optim) -> Objective:
    """Build the objective from a run's configuration, without a backbone.

    Raises ``ValueError`` for a bad class and bad parameters.
    """
    objective_class(cfg.loss)  # called for its errors, which name the class
    options = {str(key): value for key, value in cfg.humanline.items() if key != "enabled"}
    objective: Objective = build(
        cfg.loss,
        None,  # no backbone yet: how it is loaded depends on the needs of the objective
        without=("name",),
        optim=optim,
        seed=cfg.seed,
        humanline=Humanline(**options) if cfg.humanline.enabled else None,
        non_finite=cfg.non_finite,
    )
    return objective


def objective_maker(node: DictConfig) -> partial[Objective]:
    """Return the constructor of a ``loss`` node's objective with its parameters bound; its argument is a backbone."""
    objective_class(node)
    return as_partial(node, ("name",))


def build_model(cfg: DictConfig, objective: Objective, optim: Optim) -> BackboneFactory:
    """Build the factory that loads the policy and its reference once the strategy is set up."""
    spec: ModelSpec = build(cfg.model)
    if spec.compile:
        check_compiler(cfg.trainer.accelerator)
    if spec.liger:
        check_liger(cfg.trainer.accelerator)
    spec = spec.resolved(streaming=cfg.data.streaming and objective.needs.reference)
    model = BackboneFactory(spec, dtype=torch.bfloat16 if cfg.precision == "bf16-true" else torch.float32)
    if cfg.strategy.name == "fsdp_tp":
        check_model(spec, optim, cfg.strategy.tensor_parallel_size)
    return model


def _traits(objective: Objective) -> dict[str, bool]:
    # The properties of an objective that the rules of combinations test. They can depend on its parameters, so they are
    # not written in its YAML.
    return {
        REFERENCE: objective.needs.reference,
        WHOLE_STEP: objective.needs.whole_step,
        COUNTS: objective.needs.label_counts,
        GENERATES: objective.generates,
    }


def _check_data(cfg: DictConfig, objective: Objective, data: PreferenceDataModule) -> None:
    reward = data.source.true_reward()
    _check_sampling(cfg.sampling.size, reward)
    samples = reward is not None and bool(cfg.sampling.size) and objective.generates
    check_metric(cfg.sweep_metric, max_kl=cfg.sweep_max_kl, samples=samples)


def _check_sampling(size: int, reward: TrueReward | None) -> None:
    # Draw the prompts of the final samples already now: an error at the end of the run would waste it.
    try:
        if reward is not None and size:
            reward.prompts(size)
    except (ValueError, TypeError) as error:
        raise ValueError(f"sampling.size: {str(error).removeprefix('size: ')}") from error


def _plan(cfg: DictConfig, objective: Objective, data: PreferenceDataModule, trainer: pl.Trainer) -> None:
    accumulate = trainer.accumulate_grad_batches
    data.plan(
        epochs=cfg.trainer.max_epochs,
        max_steps=cfg.trainer.max_steps,
        accumulate=accumulate,
        world_size=data_ranks(trainer)[1],
    )
    trainer.val_check_interval = validation_interval(
        cfg.trainer.val_check_interval, steps=data.steps, accumulate=accumulate
    )
    objective.check(accumulate, data.label_counts)


def _callbacks(
    cfg: DictConfig,
    folder: RunFolder,
    record: RunRecord,
    objective: Objective,
    data: PreferenceDataModule,
    model: BackboneFactory,
) -> list[Callback]:
    prompts = data.prepared.prompts[: cfg.sampling.prompts if objective.generates else 0]
    tokens = data.preparation.tokens(model.tokenizer)
    callbacks: list[Callback] = [
        KeepFreedMemory(),
        ranks.RecordRankAddresses(),
        *_reference_sync(cfg, objective),
        record,
        TensorBoardReport(),
        SampledReplies(tokens, list(prompts), max_new_tokens=cfg.sampling.max_new_tokens, seed=cfg.seed),
        Checkpoints(folder.checkpoints, every=cfg.checkpoint_every, identity={}, record=record),
    ]
    if isinstance(data, StreamingDataModule):
        callbacks.append(StreamReport(data, folder.root))
    return [*callbacks, Progress()] if cfg.trainer.enable_progress_bar else callbacks


def _reference_sync(cfg: DictConfig, objective: Objective) -> list[Callback]:
    if not cfg.reference_sync.every:
        return []
    sync = ReferenceSync(every=cfg.reference_sync.every, alpha=cfg.reference_sync.alpha)
    sync.check(objective)
    return [sync]


def _loggers(cfg: DictConfig) -> list[Any]:
    loggers: list[Any] = [CSVMetrics(Path(cfg.output_dir) / "metrics.csv")]
    if cfg.logger._target_ is not None:
        loggers.append(instantiate(cfg.logger))
    return loggers


def hyperparameters(cfg: DictConfig) -> dict[str, Any]:
    """The numbers and names of a configuration that TensorBoard lists with a run's results."""
    values: dict[str, Any] = {"precision": cfg.precision, "seed": cfg.seed, "strategy": cfg.strategy.name}
    for key, value in flatten(plain(cfg)).items():
        group, _, name = key.partition(".")
        if group in ("loss", "optim", "data", "model") and name[:1] != "_" and "." not in name:
            values |= {key: value} if isinstance(value, int | float | str) else {}
    return values


def plain(node: DictConfig) -> dict[str, Any]:
    """A node of the configuration as plain dictionaries and lists, resolved."""
    container: Any = OmegaConf.to_container(node, resolve=True)
    return dict(container)
