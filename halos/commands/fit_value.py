"""``fit_value(cfg)``: the value function of the people behind feedback, by likelihood, as settings of ``loss=halo``."""

import json
import logging
import random
import re
import shlex
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from omegaconf import DictConfig

from halos import terminal
from halos.checks import check_whole
from halos.commands.held_data import read_data, results_folder
from halos.commands.judge import make_judge
from halos.config.devices import check_place
from halos.config.roles import check_trusted_models
from halos.data.records.record import prompt_key, reply_text
from halos.evaluation.answers import Answers, Array
from halos.evaluation.evaluator import feedback_rewards
from halos.evaluation.heldout import HeldOut, answered
from halos.evaluation.plan import EvaluationPlan, Settings
from halos.evaluation.value_fit import check_fixed, fit_value as fit
from halos.evaluation.value_fit_report import as_json, loss_yaml, show
from halos.files import in_home, write_atomically
from halos.policy.lookup import Policy, find_policy, reference_of
from halos.sampling.prompts import HeldData

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)


def fit_value(cfg: DictConfig) -> dict[str, Any]:
    """Fit the value function, print it, and write ``fit_value.json`` and ``loss/NAME.yaml`` into ``cfg.output``.

    Returns:
        The content of ``fit_value.json``.

    Raises:
        ValueError: a setting, the data or a model cannot work, or the answers determine nothing.
    """
    terminal.set_up_logging()
    fixed = _checked(cfg)
    trusted = check_trusted_models(cfg.trust_remote_code)
    policy = None if cfg.policy is None else find_policy("policy", cfg.policy, trusted=trusted)
    folder = in_home(cfg.output) if policy is None else results_folder(cfg.output, policy, "fit_value")
    data = _drawn(read_data(cfg.get("data"), policy, cfg.split, cfg.seed, cfg.get("trust")), cfg.size, cfg.seed)
    held = answered(data.records, data.selection, data.training)
    if not held.labels and not held.pairs:
        hint = "data.select.labels_from_scores=median makes labels of scores"
        raise ValueError(f"data: expected labels or pairs, found neither; {hint}")
    pl.seed_everything(cfg.seed, verbose=False)
    rewards, lengths, origin = _rewards(cfg, policy, data, held, trusted)
    result = fit(_answers(held, rewards, lengths), fixed)
    answers = f"{len(held.labels):,} labels and {len(held.pairs):,} pairs, with {origin}"
    show(result, answers, "word" if policy is None else "token")
    content = {"answers": answers, **as_json(result)}
    _write(folder, cfg.name, content, loss_yaml(cfg.name, result, answers))
    return content


def _checked(cfg: DictConfig) -> dict[str, float]:
    """Check the settings that need no data, and return the values of fixed parameters."""
    check_place(cfg.device, cfg.precision)
    check_whole("size", cfg.size, 1, null=True)
    check_whole("batch_size", cfg.batch_size, 1)
    if not NAME.fullmatch(str(cfg.name)):
        raise ValueError(f"name: expected letters, digits and _, found {cfg.name!r}")
    if cfg.policy is not None and cfg.get("judge") is not None:
        raise ValueError("judge: expected null with a policy, whose log-ratios are the rewards; found a judge")
    if cfg.policy is None and cfg.output is None:
        raise ValueError("output: expected a folder for the results; only a run's folder has a place for them")
    return check_fixed({name: value for name, value in cfg.fix.items() if value is not None})


def _drawn(data: HeldData, size: int | None, seed: int) -> HeldData:
    if size is None or size >= len(data.records):
        return data
    places = sorted(random.Random(seed).sample(range(len(data.records)), size))
    return replace(data, records=[data.records[place] for place in places])


def _rewards(
    cfg: DictConfig, policy: Policy | None, data: HeldData, held: HeldOut, trusted: Collection[str]
) -> tuple[Array, Array, str]:
    """Return the reward of each reply (NaN if it has none), its length, and a description of the rewards."""
    if policy is not None:
        reference = None if policy.is_classifier else reference_of(policy, cfg.reference, trusted)
        if reference is None and not policy.is_classifier:
            raise ValueError("reference: expected a model, found none; only a run's folder brings its own")
        place = {"device": cfg.device, "precision": cfg.precision, "batch_size": cfg.batch_size}
        settings = Settings(seed=cfg.seed, size=0, progress=cfg.progress, **place)
        rewards, lengths = feedback_rewards(EvaluationPlan(settings, policy, reference, data, held))
        scored = f"scores of {policy.name}"
        return rewards, lengths, scored if reference is None else f"log-ratios of {policy.name} to {reference.name}"
    replies = list(zip(held.prompts, held.completions, strict=True))
    lengths = np.array([len(re.findall(r"\w+", reply_text(reply))) for reply in held.completions], dtype=float)
    if cfg.get("judge") is not None:
        judge = make_judge(cfg.judge, data.source, device=cfg.device, precision=cfg.precision, progress=cfg.progress)
        return np.array(judge.scores(replies), dtype=float), lengths, f"scores of {type(judge).__name__}"
    if data.selection.labels_from_scores is not None:
        raise ValueError(
            "data.select.labels_from_scores: expected null, or rewards that are not these scores; set policy"
        )
    scores_by_reply = {(prompt_key(r.prompt), c.reply): c.score for r in data.records for c in r.completions}
    rewards = np.array([scores_by_reply[prompt_key(prompt), reply] for prompt, reply in replies], dtype=float)
    if np.isnan(rewards).all():
        raise ValueError("policy: expected a policy, a judge or scores of the labelled replies in the data, found none")
    return rewards, lengths, "scores in the data"


def _answers(held: HeldOut, rewards: Array, lengths: Array) -> Answers:
    """Return the answers on replies that have a reward."""
    known = ~np.isnan(rewards)
    labels = [(reply, good) for reply, good in held.labels if known[reply]]
    pairs = [pair for pair in held.pairs if known[list(pair)].all()]
    if left_out := len(held.labels) + len(held.pairs) - len(labels) - len(pairs):
        log.warning("data: %s answers are left out, as a reply of theirs has no score", f"{left_out:,}")
    return Answers(
        rewards,
        lengths,
        np.array([reply for reply, _ in labels], dtype=np.int64),
        np.array([good for _, good in labels], dtype=np.bool_),
        np.array(pairs, dtype=np.int64).reshape(-1, 2),
    )


def _write(folder: Path, name: str, content: dict[str, Any], loss: str) -> None:
    (folder / "loss").mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "fit_value.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_atomically(folder / "loss" / f"{name}.yaml", loss)
    terminal.say(f"results: {folder}")
    terminal.say(f"train with it: python scripts/train.py --config-dir {shlex.quote(str(folder))} loss={name}")
