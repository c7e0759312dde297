"""The end of a run: the exported policy, samples from it if the true reward is known, and the summary."""

import logging
import platform
from dataclasses import replace
from typing import Any

import torch

from halos.commands.assembly import Run
from halos.commands.export import card_of, hyperparameters, write_model
from halos.config.nodes import flatten, plain
from halos.policy.export.card import installed_versions
from halos.policy.export.hub import push
from halos.policy.loading import LoadOptions
from halos.policy.logprobs.compiling import uncompiled
from halos.processes.collectives import full_tensor
from halos.processes.provenance import command_line
from halos.reporting import data_report, run_report
from halos.reporting.board_report import log_hparams
from halos.sampling.before_after import Comparison, compare
from halos.sharding.weights import gathered_policy
from halos.terminal import say
from halos.training.checkpoint_files import BEST, LAST
from halos.training.record import peak_gpu_mb, peak_rss_mb

log = logging.getLogger(__name__)


def finish(run: Run, step: int) -> dict[str, Any]:
    """Export the policy, sample from it if the true reward is known, and write and return the summary.

    Args:
        run: the run, after its last step.
        step: the step after which the policy had these weights.
    """
    summary = _summary(run, step)
    policy: Any = gathered_policy(run.objective.trained)
    score = None if run.objective.generates else full_tensor(run.objective.reward_head.linear.weight).detach()
    if not run.trainer.is_global_zero:
        return summary | {"train_loss": run.record.train_loss}
    settings = hyperparameters(flatten(plain(run.cfg))) | _amounts(run, step)
    card = card_of(run.cfg, run.objective, settings, summary["metrics"], step)
    card = replace(card, command=command_line(), commit=run.commit)
    with uncompiled(policy):
        write_model(run.objective, run.model, policy, score, run.folder.model, card)
        comparison = _compare(run, policy, run.trainer.strategy.root_device)
    if comparison is not None:
        summary["samples"] = comparison.summary()
        run_report.show_comparison(comparison)
    log_hparams(run.trainer, settings, summary["metrics"], summary.get("samples", {}))
    at_the_end = [(run.trainer.global_step, run.replies.metrics)] if run.replies.metrics else []
    best = run.checkpoints.best
    run_report.show_metrics(run.record.validations or at_the_end, None if best is None else best[0])
    if run.data.streams:
        data_report.show_data({"train": run.data.prepared.intake.reports["train"]})
    summary["train_loss"] = run.record.train_loss  # the longest entry stands last
    run.folder.write_summary(summary)
    run_report.show_where_next(run.folder.root, run.folder.model)
    if run.cfg.hub.push is not None:
        say(f"hub:    {push(run.folder.model, run.cfg.hub.push, private=run.cfg.hub.private)}")
    return summary


def _summary(run: Run, step: int) -> dict[str, Any]:
    trainer = run.trainer
    validated = next((metrics for number, metrics in run.record.validations[::-1] if number == step), {})
    return {
        "loss": run.cfg.loss.name,
        "strategy": run.cfg.strategy.name,
        "precision": run.cfg.precision,
        "seed": run.cfg.seed,
        "world_size": trainer.world_size,
        "steps": trainer.global_step,
        "exported_step": step,
        "examples": trainer.global_step * run.examples_per_step,
        "tokens": run.data.tokens_in(trainer.global_step),
        "train_seconds": run.record.seconds,
        "reference_seconds": run.objective.trained.reference_seconds,
        "peak_rss_mb": peak_rss_mb(),
        "peak_gpu_mb": peak_gpu_mb(),
        "metrics": validated or run.replies.metrics,
        "versions": {"python": platform.python_version(), **installed_versions()},
        "commit": run.commit,
        "command": command_line(),
        "paths": _paths(run),
        **({"skipped_steps": run.objective.skipped_steps} if run.objective.non_finite == "skip" else {}),
    }


def _amounts(run: Run, step: int) -> dict[str, float]:
    passes = run.data.passes(step)  # None for a stream
    known = {} if passes is None else {"passes": round(passes, 2)}
    return {"devices": run.trainer.world_size, "examples_per_step": run.examples_per_step, **known}


def _paths(run: Run) -> dict[str, str | None]:
    root, best = run.folder.root.absolute(), run.checkpoints.best_path
    checkpoints = root / run.folder.checkpoints.name
    return {
        "output_dir": str(root),
        "model": str(root / run.folder.model.name),
        "metrics": str(root / "metrics.csv"),
        "last_checkpoint": str(checkpoints / LAST),
        "best_checkpoint": None if best is None else str(checkpoints / BEST),
    }


def _compare(run: Run, policy: Any, device: torch.device) -> Comparison | None:
    reward, sampling, spec = run.data.preparation.source.true_reward(), run.cfg.sampling, run.model.spec
    if reward is None or not sampling.size or not run.objective.generates:
        return None
    trained = run.objective.trained
    # Without a live reference, or with one that has moved, the policy is compared with a fresh one.
    # If the policy is sharded, so is its live reference, and the first process by itself cannot sample from it.
    reference: Any = None if run.cfg.reference_sync.every or trained.sharded else trained.reference
    policy = policy.to(device)  # Lightning has moved everything to the CPU
    if reference is None and spec.random_weights:
        log.info("samples: not compared, as the random weights that training started from were not kept")
        return None
    if reference is None:
        start = spec.of_reference() if spec.reference_path is not None else spec
        load = LoadOptions(dtype=policy.dtype, vocabulary=len(run.model.tokenizer), quiet=True)
        reference = start.load(load).eval()
    reference = reference.to(device)
    options = {"size": sampling.size, "max_new_tokens": sampling.max_new_tokens, "seed": run.cfg.seed}
    return compare(policy, reference, run.tokens, reward, **options, control=run.objective.control)
