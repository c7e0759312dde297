"""The end of a run: the exported policy, samples from it where the true reward is known, and the summary."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from halos.commands.assembly import Run
from halos.config.nodes import flatten, plain
from halos.policy.adapters import merge_adapter
from halos.policy.export.card import ModelCard
from halos.policy.export.language_model import export_policy
from halos.policy.export.reward_model import export_reward_model
from halos.policy.loading import LoadOptions
from halos.policy.logprobs.compiling import uncompiled
from halos.processes.collectives import full_tensor
from halos.reporting import run_report
from halos.reporting.tensorboard import log_hparams
from halos.sampling.before_after import Comparison, compare
from halos.sharding.weights import gathered_policy
from halos.training.record import peak_gpu_mb, peak_rss_mb

log = logging.getLogger(__name__)


def finish(run: Run) -> dict[str, Any]:
    """Export the policy, sample from it where the true reward is known, and write and return the summary."""
    summary = _summary(run)
    policy: Any = gathered_policy(run.objective.trained)
    score = None if run.objective.generates else full_tensor(run.objective.reward_head.linear.weight).detach()
    if not run.trainer.is_global_zero:
        return summary
    settings = hyperparameters(flatten(plain(run.cfg)))
    card = _card(run, summary, settings)
    with uncompiled(policy):
        _export(run, card, policy, score)
        comparison = _compare(run, policy, run.trainer.strategy.root_device)
    if comparison is not None:
        summary["samples"] = comparison.summary()
        run_report.show_comparison(comparison)
    final = summary["metrics"] | {f"samples/{name}": value for name, value in summary.get("samples", {}).items()}
    log_hparams(run.trainer, settings, final)
    run_report.show_metrics(summary["metrics"])
    if run.data.streams:
        run_report.show_data({"train": run.data.prepared.intake.reports["train"]})
    run.folder.write_summary(summary)
    run_report.show_where_next(run.folder.root, run.folder.model)
    return summary


def _summary(run: Run) -> dict[str, Any]:
    trainer = run.trainer
    return {
        "loss": run.cfg.loss.name,
        "strategy": run.cfg.strategy.name,
        "precision": run.cfg.precision,
        "world_size": trainer.world_size,
        "steps": trainer.global_step,
        "examples": trainer.global_step * run.examples_per_step,
        "tokens": run.data.tokens_in(trainer.global_step),
        "train_seconds": run.record.seconds,
        "reference_seconds": run.objective.trained.reference_seconds,
        "peak_rss_mb": peak_rss_mb(),
        "peak_gpu_mb": peak_gpu_mb(),
        "train_loss": run.record.train_loss,
        "metrics": run.record.val_metrics,
        **({"skipped_steps": run.objective.skipped_steps} if run.objective.non_finite == "skip" else {}),
    }


def hyperparameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and names among the settings of a run that TensorBoard lists with its results."""
    values = {key: settings[key] for key in ("precision", "seed")} | {"strategy": settings["strategy.name"]}
    for key, value in settings.items():
        group, _, name = key.partition(".")
        if group in ("loss", "optim", "data", "model") and name[:1] != "_" and "." not in name:
            values |= {key: value} if isinstance(value, int | float | str) else {}
    return values


def _card(run: Run, summary: Mapping[str, Any], settings: Mapping[str, Any]) -> ModelCard:
    train = run.cfg.data.get("train")
    return ModelCard(
        loss=run.cfg.loss.name,
        base=run.model.spec.path,
        paper=run.objective.paper,
        data=[train] if isinstance(train, str) else list(train or ()),
        hyperparameters={**settings, "steps": summary["steps"]},
        metrics=summary["metrics"],
    )


def _export(run: Run, card: ModelCard, policy: Any, score: torch.Tensor | None) -> None:
    tokenizer, folder, end_of_turn = run.model.tokenizer, run.folder.model, run.tokens.end_of_turn
    lora = run.model.spec.lora
    if lora.enabled and lora.export == "merged":
        merge_adapter(policy)
    if score is None:
        control = run.objective.control(True)
        export_policy(policy, tokenizer, folder, end_of_turn=end_of_turn, control=control, card=card)
    else:
        export_reward_model(policy, score, tokenizer, folder, end_of_turn=end_of_turn, card=card)


def _compare(run: Run, policy: Any, device: torch.device) -> Comparison | None:
    reward, sampling, spec = run.data.preparation.source.true_reward(), run.cfg.sampling, run.model.spec
    if reward is None or not sampling.size or not run.objective.generates:
        return None
    trained = run.objective.trained
    # Without a live reference, or with one that has moved, the policy is compared with the model that it started from.
    # The reference of a sharded policy is sharded too: the first process alone cannot sample from it.
    reference: Any = None if run.cfg.reference_sync.every or trained.sharded else trained.reference
    policy = policy.to(device)  # Lightning has moved everything to the CPU
    if reference is None and spec.random_weights:
        log.info("samples: not compared, as the random weights that training started from were not kept")
        return None
    if reference is None:
        start = spec.of_reference() if spec.reference_path is not None else spec
        reference = start.load(LoadOptions(dtype=policy.dtype, vocabulary=len(run.model.tokenizer))).eval()
    reference = reference.to(device)
    options = {"size": sampling.size, "max_new_tokens": sampling.max_new_tokens, "seed": run.cfg.seed}
    return compare(policy, reference, run.tokens, reward, **options, control=run.objective.control)
