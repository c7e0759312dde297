"""``evaluate(cfg)``: a policy on held-out feedback, its samples against its reference, and a judge's verdicts."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig

from halos import terminal
from halos.commands.held_data import read_data, results_folder
from halos.commands.judge import make_judge
from halos.config.nodes import plain
from halos.config.roles import check_trusted_models
from halos.evaluation import evaluator, report
from halos.evaluation.heldout import held_out
from halos.evaluation.plan import EvaluationPlan, Settings
from halos.evaluation.results import write_results
from halos.policy.lookup import find_policy, reference_of


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate a policy and write the results into ``cfg.output``.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        ValueError: a setting, the data or a model cannot work, found before weights are loaded; or a later stage
            fails, such as a judge that answers nothing. The results of the stages before it have been written.
    """
    terminal.set_up_logging()
    node = plain(cfg)
    settings = Settings(**{field.name: node[field.name] for field in fields(Settings)})
    # Samples and intervals have seeds of their own; this is for libraries that draw from global generators.
    pl.seed_everything(settings.seed, verbose=False)
    plan, folder = _plan(cfg, settings)
    # Written stage by stage: if the judge or a task fails, earlier results are kept.
    for results in evaluator.evaluate(plan):
        write_results(folder, results)
    report.show(results)
    terminal.say(f"results: {folder}")
    return results.as_json()


def _plan(cfg: DictConfig, settings: Settings) -> tuple[EvaluationPlan, Path]:
    """Find the models, read the data, make the judge and check them together; cheap steps come first."""
    trusted = check_trusted_models(cfg.trust_remote_code)
    policy = find_policy("policy", cfg.policy, trusted=trusted)
    # A classifier's rewards are its own scores, not log-ratios to a reference.
    reference = None if policy.is_classifier else reference_of(policy, cfg.reference, trusted)
    folder = results_folder(cfg.output, policy, "evaluation")
    data = read_data(cfg.get("data"), policy, cfg.split, settings.seed, cfg.get("trust"))
    judge = opponent = None
    if cfg.get("judge") is not None:
        place = {"device": settings.device, "precision": settings.precision}
        judge = make_judge(cfg.judge, data.source, **place, progress=settings.progress)
        opponent = reference if cfg.opponent == "reference" else None
        if cfg.opponent not in ("reference", "data"):
            opponent = find_policy("opponent", cfg.opponent, trusted=trusted)
    held, name = held_out(data.records, data.selection, data.training), str(cfg.opponent)
    plan = EvaluationPlan(settings, policy, reference, data, held, judge, opponent=name, opponent_policy=opponent)
    # Last, so that a refused evaluation leaves no empty folder.
    folder.mkdir(parents=True, exist_ok=True)
    return plan, folder
