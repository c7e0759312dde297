"""``evaluate(cfg)``: a policy on held-out feedback, its samples against its reference, and what a judge says."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from omegaconf import DictConfig

from halos import terminal
from halos.data.records.record import Prompt, prompt_key
from halos.data.rows.chat_tokens import ChatTokens
from halos.evaluation import report
from halos.evaluation.calibration import calibration_error, draw_reliability, reliability
from halos.evaluation.duels import best_of_data, win_rate
from halos.evaluation.harness import run_tasks
from halos.evaluation.heldout import feedback_metrics, likelihood_metrics, on_policy_metrics
from halos.evaluation.preparation import Evaluation, check_settings, prepare
from halos.evaluation.scoring import Array, Scores, score
from halos.evaluation.statistics import Estimate, mean, rate
from halos.files import write_atomically
from halos.judges.base import CompletionJudge
from halos.judges.reward_model import RewardModel
from halos.policy.lookup import Policy
from halos.sampling.engines import TransformersEngine, make_engine
from halos.sampling.prompts import Asked, distinct_prompts
from halos.sampling.sampler import Drawn, Sampler

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate as configured and leave the results in ``cfg.output``; returns what ``evaluation.json`` holds.

    Results are written as they come, with the judge's and those of tasks last.

    Raises ``ValueError`` for a bad configuration, bad data or a bad model, before weights are loaded.
    """
    terminal.set_up_logging()
    check_settings(cfg)
    pl.seed_everything(cfg.seed, verbose=False)
    this = prepare(cfg)
    this.results |= {
        "policy": this.policy.name,
        "reference": this.reference.name if this.reference else None,
        "beta": this.beta,
        "counts": {"records": len(this.data.records), "pairs": len(this.held.pairs), "labels": len(this.held.labels)},
        "left_out": dict(this.data.report + this.held.report),
    }
    metrics = _classifier(this) if this.policy.is_classifier else _language_model(this)
    this.save(metrics)
    if cfg.tasks:
        this.results["tasks"] = _tasks(this)
        this.save(metrics)
    report.show(this.results)
    terminal.say(f"results: {this.folder}")
    return this.results


def _classifier(this: Evaluation) -> dict[str, Estimate]:
    model = RewardModel(this.policy.name, limits=this.data.limits, **this.where)
    said = list(zip(this.held.prompts, this.held.completions, strict=True))
    rewards, tokens = np.array(model.scores(said), dtype=float), np.array(model.tokens(said), dtype=float)
    _write_rewards(this, rewards)
    return feedback_metrics(this.held, rewards, tokens, resamples=this.cfg.resamples)


def _language_model(this: Evaluation) -> dict[str, Estimate]:
    resamples = this.cfg.resamples
    tokens = ChatTokens(this.policy.tokenizer, this.data.limits)
    prompts = [Asked(f"prompt {n}", prompt) for n, prompt in enumerate(this.held.prompts)]
    ours, theirs = _prompt_ids(this, prompts)
    completions = [
        tokens.fit_completion(tokens.completion(text), max(len(a), len(b)))[0]
        for text, a, b in zip(this.held.completions, ours, theirs, strict=True)
    ]
    size = len(this.policy.tokenizer)
    this.policy_model = this.policy.load(**this.where, vocabulary=size)
    this.reference_model = this.reference.load(**this.where, vocabulary=size) if this.reference else None
    scores = _score(this, ours, theirs, completions, "held-out feedback")
    metrics: dict[str, Estimate] = {}
    if this.reference is not None:
        rewards = this.beta * scores.log_ratios
        metrics |= feedback_metrics(this.held, rewards, scores.tokens, resamples=resamples)
        _write_rewards(this, rewards)
    metrics |= likelihood_metrics(this.held, scores, resamples=resamples)
    this.save(metrics)
    return metrics if this.cfg.size == 0 else _samples(this, tokens, metrics)


def _prompt_ids(this: Evaluation, asked: Sequence[Asked]) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of the prompts as the policy reads them (with CSFT's control token), and as the reference does."""
    found = []
    for model in (this.policy, this.reference or this.policy):
        tokens = ChatTokens(model.tokenizer, this.data.limits)
        found.append([tokens.fit_prompt(tokens.prompt(a.prompt, model.control, where=a.id), a.id)[0] for a in asked])
    return found[0], found[1]


def _score(this: Evaluation, ours: Any, theirs: Any, completions: Any, name: str) -> Scores:
    track = partial(terminal.track, name, shown=this.cfg.progress)
    models = (this.policy_model, this.reference_model)
    return score(*models, ours, theirs, completions, batch_size=this.cfg.batch_size, track=track)


def _samples(this: Evaluation, tokens: ChatTokens, metrics: dict[str, Estimate]) -> dict[str, Estimate]:
    """The metrics with those of samples, and of what the judge says of them."""
    asked = distinct_prompts(this.data.records, this.cfg.size, this.cfg.seed)
    drawn = _draw(this, this.policy, this.policy_model, asked)
    lines: list[dict[str, Any]] = [{"prompt": _shown(one.asked.prompt), "completions": one.texts} for one in drawn]
    _write_lines(this.folder / "samples.jsonl", lines)
    ours, theirs = _prompt_ids(this, asked)
    times = [len(one.completions) for one in drawn]
    flat = [ids for one in drawn for ids in one.completions]
    groups = [group for group, count in enumerate(times) for _ in range(count)]
    scores = _score(this, [ours[g] for g in groups], [theirs[g] for g in groups], flat, "KL of samples")
    metrics = metrics | on_policy_metrics(scores, groups, resamples=this.cfg.resamples)
    cut = [float(ids[-1] != tokens.end_of_turn) for ids in flat]
    metrics["samples/cut_by_limit"] = rate(cut, groups, resamples=this.cfg.resamples)
    this.save(metrics)
    return metrics if this.judge is None else metrics | _judged(this, this.judge, asked, drawn, lines)


def _judged(
    this: Evaluation,
    judge: CompletionJudge,
    asked: Sequence[Asked],
    drawn: Sequence[Drawn],
    lines: list[dict[str, Any]],
) -> dict[str, Estimate]:
    resamples = this.cfg.resamples
    theirs = _opponents(this, asked)
    met = [n for n, texts in enumerate(theirs) if texts]
    if not met:
        raise ValueError("opponent=data: expected desirable completions of the sampled prompts, found none")
    prompts = [asked[n].prompt for n in met]
    ours, opponents = [drawn[n].texts for n in met], [theirs[n] for n in met]
    for n in met:
        lines[n]["opponent"] = theirs[n]
    _write_lines(this.folder / "samples.jsonl", lines)
    result = win_rate(judge, prompts, ours, opponents, resamples=resamples)
    this.results["win_rate"] = {"opponent": this.cfg.opponent, "prompts": len(met), **result.as_json()}
    metrics = {"judge/win_rate": result.rate}
    if not judge.asks_twice:
        metrics |= _rated(judge, prompts, {"policy": ours, "opponent": opponents}, resamples)
    this.results["judge"] = judge.report()
    return metrics


def _rated(
    judge: CompletionJudge, prompts: list[Prompt], sides: dict[str, list[list[str]]], resamples: int
) -> dict[str, Estimate]:
    metrics = {}
    for name, texts in sides.items():
        said = [(prompt, text) for prompt, some in zip(prompts, texts, strict=True) for text in some]
        groups = [group for group, some in enumerate(texts) for _ in some]
        metrics[f"judge/score_{name}"] = mean([s or 0.0 for s in judge.scores(said)], groups, resamples=resamples)
        labels = [float(label or False) for label in judge.labels(said)]
        if judge.labels_are_absolute:
            metrics[f"judge/desirable_{name}"] = rate(labels, groups, resamples=resamples)
    return metrics


def _opponents(this: Evaluation, asked: Sequence[Asked]) -> list[list[str]]:
    if this.cfg.opponent == "data":
        best = best_of_data(this.data.records)
        return [best.get(prompt_key(one.prompt), []) for one in asked]
    if this.opponent is None:
        assert this.reference is not None
        return [one.texts for one in _draw(this, this.reference, this.reference_model, asked)]
    return [one.texts for one in _draw(this, this.opponent, None, asked)]


def _draw(this: Evaluation, policy: Policy, model: Any, asked: Sequence[Asked]) -> list[Drawn]:
    cfg, tokens = this.cfg, ChatTokens(policy.tokenizer, this.data.limits)
    if cfg.engine == "transformers" and model is not None:
        engine: Any = partial(TransformersEngine, model, tokens, this.decoding)
    else:
        engine = partial(make_engine, cfg.engine, policy, tokens, this.decoding, **this.where)
    sampler = Sampler(
        engine, tokens, control=policy.control, count=cfg.samples, batch_size=cfg.batch_size * 4, seed=cfg.seed
    )
    return sampler.draw_all(asked, partial(terminal.track, f"sampling {policy.name}", shown=cfg.progress))


def _write_rewards(this: Evaluation, rewards: Array) -> None:
    """Rewards of labelled completions, and the reliability diagram of pairs."""
    lines = [{"reward": float(rewards[i]), "desirable": bool(desirable)} for i, desirable in this.held.labels]
    _write_lines(this.folder / "rewards.jsonl", lines)
    if this.held.pairs:
        margins = [float(rewards[a] - rewards[b]) for a, b in this.held.pairs]
        draw_reliability(reliability(margins), calibration_error(margins), this.folder / "reliability.png")


def _write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    write_atomically(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _shown(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


def _tasks(this: Evaluation) -> dict[str, dict[str, float]]:
    cfg = this.cfg
    return run_tasks(
        this.policy_model,
        this.policy.tokenizer,
        list(cfg.tasks),
        folder=cfg.task_folder,
        limit=cfg.task_limit,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
    )
