"""``train(cfg)``: one run from its configuration to its outputs."""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from halos.commands.assembly import Run, assemble
from halos.commands.finish import finish
from halos.commands.replies import validation_plan
from halos.files import path_named
from halos.objectives.halo import HALO
from halos.processes import ranks, signals
from halos.processes.collectives import data_ranks
from halos.reporting import run_report
from halos.reporting.data_report import show_data, show_example, show_report, write_report
from halos.sharding.consolidate import sharded_weights
from halos.sharding.sharding import load_full_state
from halos.training.checkpoint_files import check_identity, read
from halos.training.checkpoints import early_stop
from halos.training.result import check_validated
from halos.training.run_folder import held

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train as configured and leave the outputs in ``cfg.output_dir``.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        ValueError: for a bad configuration, bad data or a bad model, before weights are loaded; after the first
            validation, for a setting that refers to a metric that it does not have.
        halos.processes.signals.Interrupted: if a signal ends the run. It is a ``SystemExit``.
    """
    # path_named: some writers, as TensorBoard's, report a full disk without a file. The error then names the folder.
    with signals.caught(), ranks.lost_ranks_named(), held(cfg.output_dir), path_named(Path(cfg.output_dir)):
        run = assemble(cfg)
        start = open_folder(run)
        show(run, start)
        validate_first(run)
        fit(run)
        return finish(run, restore_best(run))


def open_folder(run: Run) -> int | None:
    """Check that the run can resume from its checkpoint, and write the first files of its folder.

    Returns:
        The step from which it resumes; None if it starts anew.
    """
    run.checkpoints.identity = run.identity
    start = None
    if run.checkpoint is not None:
        saved = check_identity(run.checkpoint, run.checkpoints.identity)
        run.data.check_state(saved[type(run.data).__qualname__])
        start = int(saved["global_step"])
    config = OmegaConf.to_yaml(run.cfg, resolve=True)
    run.folder.open(config, fresh=not run.folder.owns(run.checkpoint))
    write_report(run.data.prepared.intake, run.folder.root)
    return start


def show(run: Run, start: int | None) -> None:
    """Print counts of the data, one example with its scored tokens marked, and the plan of the run."""
    data, objective = run.data, run.objective
    show_report(data.prepared.intake)
    show_data(data.prepared.intake.reports)
    example = data.prepared.example()
    label = {True: " (desirable)", False: " (undesirable)", None: ""}[example.desirable]
    names = ("chosen", "rejected") if objective.view == "pairs" else (f"completion{label}", "mismatched")
    # In a mixture of several views, an example is a record with all of its completions.
    branches = [f"completion {k}" for k in range(len(example.branches))] if example.views else names
    show_example(example, run.model.tokenizer, branches[: len(example.branches)])
    if isinstance(objective, HALO):
        from halos.commands.value_report import show_value  # it imports the checks of halos.theory

        show_value(objective, run.cfg.loss)
    run_report.show_plan(plan(run, start))


def plan(run: Run, start: int | None) -> run_report.RunPlan:
    """Return what the run is about to do, for the console."""
    data, trainer = run.data, run.trainer
    validations, validated, share = validation_plan(trainer, data)
    return run_report.RunPlan(
        steps=data.steps,
        examples=None if data.streams else len(data.rows["train"]),
        passes=data.passes(data.steps),
        batch_size=data.batch_size,
        devices=data_ranks(trainer)[1],
        accumulate=trainer.accumulate_grad_batches,
        validations=validations,
        validated=validated,
        validation_share=share,
        sampling=run.replies.plan,
        resumed=start,
        nothing_to_resume=run.cfg.resume == "auto" and start is None,
        output_dir=run.cfg.output_dir,
    )


def validate_first(run: Run) -> None:
    """Validate the policy before its first step.

    Lightning then calls ``configure_model``, which loads the models and runs the reference pass. Without validation
    data this happens in :func:`fit`.
    """
    if run.checkpoint is not None:
        return
    if "val" in run.data.rows:
        run.trainer.validate(run.objective, datamodule=run.data, verbose=False)
    try:
        for key, metric in watched(run).items():
            check_validated(key, metric, run.record.val_metrics)
    except ValueError:
        run.folder.clear()  # so that the corrected command can use it
        raise


def watched(run: Run) -> dict[str, str | None]:
    """Return the validation metrics that settings refer to, by the key of the setting."""
    cfg, metrics = run.cfg, {"checkpoint.best": run.cfg.checkpoint.best}
    if cfg.rounds.round in (None, cfg.rounds.count):  # the round whose result a sweep reads
        metrics["sweep_metric"] = cfg.sweep_metric
    callbacks = cfg.get("callbacks") or {}
    return metrics | {f"callbacks.{name}.monitor": node.get("monitor") for name, node in callbacks.items()}


def fit(run: Run) -> None:
    """Train, then validate the last step if that has not been done, with samples if the run samples."""
    trainer = run.trainer
    checkpoint = str(run.checkpoint) if run.checkpoint else None
    trainer.fit(run.objective, datamodule=run.data, ckpt_path=checkpoint, weights_only=True)
    run.checkpoints.finish(trainer)
    unmeasured = run.record.validated_at != trainer.global_step
    if not unmeasured and run.replies.sampled_at == trainer.global_step:
        run.record.complete_validation(run.replies.metrics)
    if (reason := early_stop(trainer)) is not None:
        unmeasured |= run.replies.lacks(trainer.global_step)
        log.info("stopped after %d of %d steps: %s", trainer.global_step, run.data.steps, reason)
    elif trainer.global_step < run.data.steps:  # trainer.max_time
        log.warning("stopped after %d of %d steps; resume=auto goes on", trainer.global_step, run.data.steps)
    if "val" in run.data.rows and unmeasured:
        trainer.validate(run.objective, datamodule=run.data, verbose=False)


def restore_best(run: Run) -> int:
    """Load the weights of the best validation, if they are to be exported; return the step of the policy's weights.

    All ranks call this together.
    """
    checkpoints, step = run.checkpoints, run.trainer.global_step
    best, path = checkpoints.best, checkpoints.best_path
    if run.cfg.checkpoint.export != "best" or best is None or path is None or best[0] == step:
        return step
    state = sharded_weights(path) if path.is_dir() else read(path)["state_dict"]
    if run.objective.trained.sharded:
        load_full_state(run.objective, state)
    else:
        run.objective.load_state_dict(state)
    log.info("checkpoint.export=best: the model of step %d, %s=%.4g", best[0], checkpoints.metric, best[1])
    return best[0]
