"""``train(cfg)``: one run from its configuration to its outputs."""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from halos.commands.assembly import Run, assemble
from halos.commands.finish import finish
from halos.commands.replies import validation_plan
from halos.files import path_named
from halos.processes import ranks, signals
from halos.processes.collectives import data_ranks
from halos.reporting import run_report
from halos.reporting.data_report import show_data, show_example, show_report, write_report
from halos.training.checkpoints import check_identity
from halos.training.result import check_validated
from halos.training.run_folder import held

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train as configured and leave the outputs in ``cfg.output_dir``.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        ValueError: for a bad configuration, bad data or a bad model, before weights are loaded.
        halos.processes.signals.Interrupted: if a signal asks the run to end; it is a ``SystemExit``.
    """
    # A full disk is reported with the folder where the writer does not name the file, as TensorBoard's.
    with signals.caught(), ranks.lost_ranks_named(), held(cfg.output_dir), path_named(Path(cfg.output_dir)):
        run = assemble(cfg)
        start = open_folder(run)
        show(run, start)
        validate_first(run)
        fit(run)
        return finish(run)


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
    branches = ("chosen", "rejected") if objective.view == "pairs" else ("completion", "mismatched")
    example = data.prepared.example()
    show_example(example, run.model.tokenizer, branches[: len(example.branches)])
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
    """Validate the policy before its first step. The reference pass runs when this validation starts."""
    if run.checkpoint is not None:
        return
    if "val" in run.data.rows:
        run.trainer.validate(run.objective, datamodule=run.data, verbose=False)
    if run.cfg.rounds.round in (None, run.cfg.rounds.count):  # the round whose result a sweep reads
        check_validated(run.cfg.sweep_metric, run.record.val_metrics)


def fit(run: Run) -> None:
    """Train, and validate once more unless the last step was validated."""
    trainer = run.trainer
    checkpoint = str(run.checkpoint) if run.checkpoint else None
    trainer.fit(run.objective, datamodule=run.data, ckpt_path=checkpoint, weights_only=True)
    run.checkpoints.finish(trainer)
    if trainer.global_step < run.data.steps:  # trainer.max_time
        log.warning("stopped after %d of %d steps; resume=auto goes on", trainer.global_step, run.data.steps)
    if "val" in run.data.rows and run.record.validated_at != trainer.global_step:
        trainer.validate(run.objective, datamodule=run.data, verbose=False)
