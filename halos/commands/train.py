"""``train(cfg)``: the one place that reads the configuration and puts the pieces together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from halos import terminal
from halos.commands.assembly import build_data, build_objective
from halos.config.building import build
from halos.config.values import check_values
from halos.data.batches.reference_table import ReferenceTable
from halos.data.module import PreferenceDataModule
from halos.data.records.truth import TrueReward
from halos.data.rows.chat_tokens import ChatTokens
from halos.data.streaming.module import StreamingDataModule
from halos.objectives.base import Objective
from halos.optim import Optim
from halos.policy.adapters import merge_adapter
from halos.policy.backbone import Backbone
from halos.policy.checks import check_positions, warn_of_rotary
from halos.policy.export.language_model import export_policy, unconditioned
from halos.policy.export.reward_model import export_reward_model
from halos.policy.kernels.liger import check_liger
from halos.policy.loading import ModelSpec, add_control_tokens
from halos.policy.logprobs.compiling import check_compiler, uncompiled
from halos.policy.logprobs.packed import check_packing
from halos.policy.reference.precompute import reference_table
from halos.processes import ranks, signals
from halos.processes.collectives import data_ranks, full_tensor
from halos.reporting import run_report
from halos.reporting.csv_metrics import CSVMetrics
from halos.reporting.data_report import StreamReport, show_report, write_report
from halos.reporting.progress import Progress
from halos.reporting.replies import SampledReplies
from halos.reporting.tensorboard import TensorBoardReport, log_hparams
from halos.sampling.before_after import Comparison, compare
from halos.sharding.fsdp_tp import check_model
from halos.sharding.weights import make_backbone, whole_policy
from halos.training.checkpoints import Checkpoints, check_identity
from halos.training.identity import identity
from halos.training.memory import KeepFreedMemory
from halos.training.record import RunRecord, peak_gpu_mb, peak_rss_mb
from halos.training.reference_sync import ReferenceSync
from halos.training.result import check_metric, check_validated
from halos.training.run_folder import RunFolder
from halos.training.trainer import make_trainer, validation_interval, warn_if_emulated

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """The pieces of one run, made from the configuration before any weights are read."""

    cfg: DictConfig
    folder: RunFolder
    checkpoint: Path | None
    objective: Objective
    data: PreferenceDataModule
    model: ModelSpec
    tokens: ChatTokens
    record: RunRecord
    identity: dict[str, Any] = field(default_factory=dict)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train as configured and leave the outputs in ``cfg.output_dir``; returns the summary.

    Raises ``ValueError`` for a bad configuration, bad data or a bad model, before weights are loaded, and
    :class:`halos.processes.signals.Interrupted` (a ``SystemExit``) if a signal asks the run to end.
    """
    with signals.caught(), ranks.lost_ranks_named():
        run, trainer = set_up(cfg)
        run.identity |= identity(
            cfg,
            run.data.keys(),
            model=run.model.local,
            examples_per_step=run.data.batch_size * trainer.accumulate_grad_batches * data_ranks(trainer)[1],
            accumulate=trainer.accumulate_grad_batches,
        )
        if run.checkpoint is not None:
            saved = check_identity(run.checkpoint, run.identity)
            run.data.check_state(saved[type(run.data).__qualname__])
        run.folder.open(OmegaConf.to_yaml(cfg, resolve=True), fresh=not run.folder.owns(run.checkpoint))
        write_report(run.data.intake, run.folder.root)
        _show(run)
        fit(run, trainer)
        return finish(run, trainer)


def set_up(cfg: DictConfig) -> tuple[Run, pl.Trainer]:
    """The run, its steps planned, and its Trainer: everything before files are written and weights are loaded."""
    terminal.set_up_logging()
    check_values(cfg)
    pl.seed_everything(cfg.seed, verbose=False)
    run = prepare(cfg)
    trainer = make_trainer(cfg, _callbacks(run), _loggers(run))
    warn_if_emulated(cfg.precision, trainer.strategy.root_device)
    run.data.plan(
        epochs=cfg.trainer.max_epochs,
        max_steps=cfg.trainer.max_steps,
        accumulate=trainer.accumulate_grad_batches,
        world_size=data_ranks(trainer)[1],
    )
    trainer.val_check_interval = validation_interval(
        cfg.trainer.val_check_interval, steps=run.data.steps, accumulate=trainer.accumulate_grad_batches
    )
    run.objective.check(trainer.accumulate_grad_batches, run.data.label_counts)
    return run, trainer


def prepare(cfg: DictConfig) -> Run:
    """Check the configuration, read and tokenise the data, and look at the model's files; cheapest checks first."""
    if (cfg.rounds.count != 1 or cfg.get("before")) and cfg.rounds.round is None:
        raise ValueError(
            "rounds: expected run_rounds(cfg, train) of halos.commands.rounds, which trains each round; found train"
        )
    folder = RunFolder(Path(cfg.output_dir))
    checkpoint = folder.check(resume=cfg.resume, overwrite=cfg.overwrite)
    spec: ModelSpec = build(cfg.model)
    optim: Optim = build(cfg.optim)
    if spec.compile:
        check_compiler(cfg.trainer.accelerator)
    if spec.liger:
        check_liger(cfg.trainer.accelerator)
    tokenizer: Any = None
    new_tokens: list[int] = []

    def backbone() -> Backbone:
        dtype = torch.bfloat16 if cfg.precision == "bf16-true" else torch.float32
        mode = spec.reference if objective.needs.reference else None
        make = partial(
            make_backbone,
            sharding=getattr(objective.trainer.strategy, "sharding", None),
            dtype=dtype,
            vocabulary=len(tokenizer),
        )
        made = make(spec, new_tokens=new_tokens, with_reference=mode == "live", adapter_reference=mode == "adapter")
        warn_of_rotary(made.policy.config.get_text_config(), data.limits.max_length)
        check_positions(made.policy, data.longest())
        if data.max_tokens is not None:
            check_packing(made.policy)
        if mode == "cached":
            scored = made
            if spec.reference_path is not None:
                scored = make(spec.of_reference(), new_tokens=(), with_reference=False)
            data.reference, made.reference_seconds = _cached_reference(cfg, scored, data, objective.trainer)
        return made

    objective = build_objective(cfg, backbone, optim)
    spec = spec.resolved(streaming=cfg.data.streaming and objective.needs.reference)
    data = build_data(cfg.data, seed=cfg.seed, cache_dir=cfg.cache_dir)
    if data.streams and objective.needs.label_counts:
        raise ValueError(
            "loss: expected weights that are numbers with data.streaming=true, found auto: they are set by the counts "
            "of all training data"
        )
    data.load(objective.view)
    judge = data.source.true_reward()
    _check_sampling(cfg.sampling.size, judge)
    samples = judge is not None and bool(cfg.sampling.size) and objective.generates
    check_metric(cfg.sweep_metric, max_kl=cfg.sweep_max_kl, samples=samples)
    spec.check()
    if cfg.strategy.name == "fsdp_tp":
        check_model(spec, optim, cfg.strategy.tensor_parallel_size)
    if spec.lora.export == "adapter" and not objective.generates:
        raise ValueError("model.lora.export: expected merged for a reward model, found adapter")
    tokenizer = spec.tokenizer()
    if spec.reference_path is not None and spec.of_reference().tokenizer().get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"model.reference_path: expected the tokenizer of {spec.path}, found another")
    unconditioned(tokenizer, objective.control(True))
    new_tokens = add_control_tokens(tokenizer, (objective.control(True), objective.control(False)))
    data.tokenise(
        tokenizer,
        control=objective.control,
        mismatched=objective.needs.mismatched,
        whole=objective.needs.last_hidden,
        grouped=objective.needs.grouped,
    )
    return Run(cfg, folder, checkpoint, objective, data, spec, ChatTokens(tokenizer, data.limits), RunRecord())


def _check_sampling(size: int, judge: TrueReward | None) -> None:
    # What is sampled at the end of a run is asked for now: an error there would cost the run.
    try:
        if judge is not None and size:
            judge.prompts(size)
    except (ValueError, TypeError) as error:
        raise ValueError(f"sampling.size: {str(error).removeprefix('size: ')}") from error


def _cached_reference(
    cfg: DictConfig, backbone: Backbone, data: PreferenceDataModule, trainer: pl.Trainer
) -> tuple[ReferenceTable, float]:
    # The policy, which is about to be moved and cast like this anyway, is the reference until its first step, unless
    # model.reference_path names another.
    precision = trainer.precision_plugin
    if not backbone.sharded:
        precision.convert_module(backbone).to(trainer.strategy.root_device)
    rows = data.scored_rows(accumulate=trainer.accumulate_grad_batches, world_size=data_ranks(trainer)[1])
    with precision.forward_context():
        return reference_table(
            backbone,
            rows,
            folder=Path(cfg.cache_dir).expanduser(),
            precision=_rounding(cfg, backbone),
            packing=data.packing,
            share_prompts=data.share_prompts,
            track=partial(terminal.track, "reference log-probs", shown=cfg.trainer.enable_progress_bar),
        )


def _rounding(cfg: DictConfig, backbone: Backbone) -> str:
    # What the log-probs depend on beside the weights: where numbers are rounded visibly, also how the model is divided,
    # and on what it computes.
    told = [str(cfg.precision)]
    if cfg.precision == "32-true":
        return told[0]
    if cfg.strategy.name == "fsdp_tp":
        told.append(f"tensor parallel {cfg.strategy.tensor_parallel_size}")
    elif backbone.sharded and cfg.precision == "bf16-mixed":  # other operations are rounded than by autocast
        told.append("sharded")
    if backbone.device.type != "cpu":  # where attention is computed in float32
        told.append(backbone.device.type)
    return ", ".join(told)


def fit(run: Run, trainer: pl.Trainer) -> None:
    """Validate, train, and validate again unless the last step was validated."""
    has_val = "val" in run.data.rows
    if run.checkpoint is None and has_val:
        trainer.validate(run.objective, datamodule=run.data, verbose=False)
    if run.checkpoint is None and run.cfg.rounds.round in (None, run.cfg.rounds.count):  # the one that a sweep is told
        check_validated(run.cfg.sweep_metric, run.record.val_metrics)
    checkpoint = str(run.checkpoint) if run.checkpoint else None
    trainer.fit(run.objective, datamodule=run.data, ckpt_path=checkpoint, weights_only=True)
    checkpoints: Any = trainer.checkpoint_callback
    checkpoints.finish(trainer)
    if trainer.global_step < run.data.steps:  # trainer.max_time
        log.warning("stopped after %d of %d steps; resume=auto goes on", trainer.global_step, run.data.steps)
    if has_val and run.record.validated_at != trainer.global_step:
        trainer.validate(run.objective, datamodule=run.data, verbose=False)


def finish(run: Run, trainer: pl.Trainer) -> dict[str, Any]:
    """Export the policy, sample from it where the true reward is known, and write the summary."""
    summary = _summary(run, trainer)
    policy = whole_policy(run.objective.trained)
    score = None if run.objective.generates else full_tensor(run.objective.reward_head.linear.weight).detach()
    if not trainer.is_global_zero:
        return summary
    card = {"loss": run.cfg.loss.name, "base": run.model.path, "steps": summary["steps"], **summary["metrics"]}
    with uncompiled(policy):
        _export(run, card, policy, score)
        comparison = _compare(run, policy, trainer.strategy.root_device)
    if comparison is not None:
        summary["samples"] = comparison.summary()
        run_report.show_comparison(comparison)
    final = summary["metrics"] | {f"samples/{name}": value for name, value in summary.get("samples", {}).items()}
    log_hparams(trainer, _hparams(run.cfg), final)
    run_report.show_metrics(summary["metrics"])
    if run.data.streams:
        run_report.show_data({"train": run.data.reports["train"]})
    run.folder.write_summary(summary)
    run_report.show_where_next(run.folder.root, run.folder.model)
    return summary


def _export(run: Run, card: Mapping[str, Any], policy: Any, score: torch.Tensor | None) -> None:
    tokenizer, folder, end = run.tokens.tokenizer, run.folder.model, run.tokens.end_of_turn
    if run.model.lora.enabled and run.model.lora.export == "merged":
        merge_adapter(policy)
    if score is None:
        control = run.objective.control(True)
        export_policy(policy, tokenizer, folder, end_of_turn=end, control=control, card=card)
    else:
        export_reward_model(policy, score, tokenizer, folder, end_of_turn=end, card=card)


def _reference_sync(run: Run) -> list[Callback]:
    if not run.cfg.reference_sync.every:
        return []
    sync = ReferenceSync(every=run.cfg.reference_sync.every, alpha=run.cfg.reference_sync.alpha)
    sync.check(run.objective)
    if run.model.reference != "live":
        raise ValueError(
            f"reference_sync.every: a reference that moves needs model.reference=live, found {run.model.reference}"
        )
    return [sync]


def _callbacks(run: Run) -> list[Callback]:
    sampling = run.cfg.sampling
    callbacks: list[Callback] = [
        KeepFreedMemory(),
        ranks.RecordRankAddresses(),
        *_reference_sync(run),
        run.record,
        TensorBoardReport(),
        SampledReplies(
            run.tokens,
            run.data.prompts[: sampling.prompts if run.objective.generates else 0],
            max_new_tokens=sampling.max_new_tokens,
            seed=run.cfg.seed,
        ),
        Checkpoints(run.folder.checkpoints, every=run.cfg.checkpoint_every, identity=run.identity, record=run.record),
    ]
    if isinstance(run.data, StreamingDataModule):
        callbacks.append(StreamReport(run.data, run.folder.root))
    return [*callbacks, Progress()] if run.cfg.trainer.enable_progress_bar else callbacks


def _loggers(run: Run) -> list[Any]:
    loggers: list[Any] = [CSVMetrics(run.folder.root / "metrics.csv")]
    if run.cfg.logger._target_ is not None:
        loggers.append(instantiate(run.cfg.logger))
    return loggers


def _compare(run: Run, policy: Any, device: torch.device) -> Comparison | None:
    judge = run.data.source.true_reward()
    if judge is None or not run.cfg.sampling.size or not run.objective.generates:
        return None
    trained = run.objective.trained
    # Without a live reference, or with one that has moved, the policy is compared with what the reference was at first.
    # That of a sharded policy is sharded too: the first process alone cannot sample from it.
    reference = None if run.cfg.reference_sync.every or trained.sharded else trained.reference
    policy = policy.to(device)  # Lightning has moved everything to the CPU
    if reference is None and run.model.random_weights:
        log.info("samples: not compared, as the random weights that training started from are gone")
        return None
    if reference is None:
        spec = run.model.of_reference() if run.model.reference_path is not None else run.model
        start = spec.load(dtype=policy.dtype, vocabulary=len(run.tokens.tokenizer))
        reference = start.eval()
    return compare(
        policy,
        reference.to(device),
        run.tokens,
        judge,
        size=run.cfg.sampling.size,
        max_new_tokens=run.cfg.sampling.max_new_tokens,
        seed=run.cfg.seed,
        control=run.objective.control,
    )


def _summary(run: Run, trainer: pl.Trainer) -> dict[str, Any]:
    accumulate, world_size = trainer.accumulate_grad_batches, data_ranks(trainer)[1]
    return {
        "loss": run.cfg.loss.name,
        "strategy": run.cfg.strategy.name,
        "precision": run.cfg.precision,
        "world_size": trainer.world_size,
        "steps": trainer.global_step,
        "examples": trainer.global_step * accumulate * world_size * run.data.batch_size,
        "tokens": run.data.tokens_in(trainer.global_step, accumulate=accumulate, world_size=world_size),
        "train_seconds": run.record.seconds,
        "reference_seconds": run.objective.trained.reference_seconds,
        "peak_rss_mb": peak_rss_mb(),
        "peak_gpu_mb": peak_gpu_mb(),
        "train_loss": run.record.train_loss,
        "metrics": run.record.val_metrics,
        **({"skipped_steps": run.objective.skipped_steps} if run.objective.non_finite == "skip" else {}),
    }


def _hparams(cfg: DictConfig) -> Mapping[str, Any]:
    nodes: Any = OmegaConf.to_container(cfg, resolve=True)
    flat: dict[str, Any] = {"precision": cfg.precision, "seed": cfg.seed, "strategy": cfg.strategy.name}
    for group in ("loss", "optim", "data", "model"):
        flat |= {f"{group}.{k}": v for k, v in nodes[group].items() if isinstance(v, int | float | str) and k[0] != "_"}
    return flat


def _show(run: Run) -> None:
    show_report(run.data.intake)
    run_report.show_data(run.data.reports)
    data = run.data
    branches = ("chosen", "rejected") if run.objective.view == "pairs" else ("completion", "mismatched (KL)")
    row = data.example()
    run_report.show_example(row, run.tokens.tokenizer, branches[: len(row.branches)])
    run_report.show_plan(
        data.steps, None if data.streams else len(data.rows["train"]), data.batch_size, run.cfg.output_dir
    )
