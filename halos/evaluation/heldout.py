"""Rewards on held-out feedback: accuracy, AUC, margin, calibration and length bias."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from halos.data.records.record import Prompt, Record, prompt_key
from halos.data.views.derive import VIEWS, Prepare
from halos.data.views.selection import Selection
from halos.evaluation.calibration import calibration_error
from halos.evaluation.scoring import Array, Scores
from halos.evaluation.statistics import Estimate, bootstrap, correlation, mean, rate, ratio
from halos.metrics import TIE, auc


@dataclass(slots=True)
class HeldOut:
    """Different completions of held-out prompts, and what people said of them by their places in ``completions``.

    ``groups`` [n]: equal numbers for equal prompts. ``pairs``: (chosen, rejected). ``labels``: (completion, desirable).
    """

    prompts: list[Prompt] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    labels: list[tuple[int, bool]] = field(default_factory=list)
    report: Counter[str] = field(default_factory=Counter)


def held_out(
    records: Sequence[Record], selection: Selection | None = None, training: Sequence[Record] | None = None
) -> HeldOut:
    """Pairs and labels of the records, each completion once, those that ``selection`` makes of scores among them.

    ``training``: the records that set the median of scores, by default the same. Raises ``ValueError`` if there is
    neither a pair nor a label.
    """
    selection, data = selection or Selection(), HeldOut()
    training = records if training is None else training
    places: dict[tuple[str, str], int] = {}
    prompts: dict[str, int] = {}

    def place(prompt: Prompt, text: str) -> int:
        key = prompt_key(prompt)
        if (key, text) not in places:
            places[key, text] = len(data.completions)
            data.prompts.append(prompt)
            data.completions.append(text)
            data.groups.append(prompts.setdefault(key, len(prompts)))
        return places[key, text]

    prepare = {name: selection.prepare(name, records, training) for name in ("pairs", "binary")}
    examples = {name: _view(name, records, how, data.report) for name, how in prepare.items()}
    if not any(examples.values()):
        VIEWS["binary"](records, prepare["binary"])  # raises, and says why
    data.pairs = [(place(e.prompt, e.chosen), place(e.prompt, e.rejected)) for e in examples["pairs"]]
    data.labels = [(place(e.prompt, e.completion), e.desirable) for e in examples["binary"]]
    return data


def _view(name: str, records: Sequence[Record], prepare: Prepare | None, report: Counter[str]) -> Sequence[Any]:
    try:
        view = VIEWS[name](records, prepare)
    except ValueError:  # this kind of feedback cannot be had from these records
        return ()
    report.update({f"{name}: {reason}": count for reason, count in view.report.items()})
    return view.examples


def feedback_metrics(data: HeldOut, rewards: Array, tokens: Array, **options: Any) -> dict[str, Estimate]:
    """Metrics of rewards [n] (β included) of the completions, whose lengths are ``tokens`` [n]."""
    metrics: dict[str, Estimate] = {}
    if data.pairs:
        metrics |= _of_pairs(data, rewards, tokens, options)
    if data.labels:
        metrics |= _of_labels(data, rewards, tokens, options)
    return metrics


def _of_pairs(data: HeldOut, rewards: Array, tokens: Array, options: dict[str, Any]) -> dict[str, Estimate]:
    chosen, rejected = (np.array(side) for side in zip(*data.pairs, strict=True))
    groups = [data.groups[i] for i in chosen]
    margins = rewards[chosen] - rewards[rejected]
    right = np.where(np.abs(margins) <= TIE, 0.5, margins > 0)
    longer = np.where(tokens[chosen] == tokens[rejected], 0.5, tokens[chosen] > tokens[rejected])
    return {
        "rewards/accuracies": rate(list(right), groups, **options),
        "rewards/margins": mean(list(margins), groups, **options),
        "rewards/ece": bootstrap(lambda i: calibration_error(margins[i]), groups, **options),
        "length/chosen_longer": rate(list(longer), groups, **options),
    }


def _of_labels(data: HeldOut, rewards: Array, tokens: Array, options: dict[str, Any]) -> dict[str, Estimate]:
    place, label = (np.array(side) for side in zip(*data.labels, strict=True))
    groups, r, length = [data.groups[i] for i in place], rewards[place], tokens[place]

    def area(i: Any) -> float:
        found = auc(torch.from_numpy(r[i]), torch.from_numpy(label[i]))
        return math.nan if found is None else found

    metrics = {"rewards/auc": bootstrap(area, groups, **options)}
    for name, side in (("chosen", label), ("rejected", ~label)):
        if side.any():
            own = [group for group, here in zip(groups, side, strict=True) if here]
            metrics[f"rewards/{name}"] = mean(list(r[side]), own, **options)
            metrics[f"length/{name}"] = mean(list(length[side]), own, **options)
    metrics["length/reward_correlation"] = correlation(list(r), list(length), groups, **options)
    return metrics


def likelihood_metrics(data: HeldOut, scores: Scores, **options: Any) -> dict[str, Estimate]:
    """Perplexity of desirable (or chosen) completions, and entropy and KL where all completions went."""
    liked = sorted({i for i, desirable in data.labels if desirable} | {i for i, _ in data.pairs})
    groups = data.groups
    metrics = {
        "data/entropy_per_token": ratio(list(scores.entropy), list(scores.tokens), groups, **options),
    }
    sides = {"perplexity": scores.logps, "perplexity_reference": scores.reference}
    for name, logps in sides.items():
        if liked and not np.isnan(logps).any():
            metrics[f"data/{name}"] = _perplexity(
                logps[liked], scores.tokens[liked], [groups[i] for i in liked], options
            )
    if not np.isnan(scores.kl).any():
        metrics["data/kl_per_token"] = ratio(list(scores.kl), list(scores.tokens), groups, **options)
        metrics["data/kl_per_completion"] = mean(list(scores.kl), groups, **options)
        metrics["data/log_ratio"] = mean(list(scores.log_ratios), groups, **options)
    return metrics


def on_policy_metrics(scores: Scores, groups: Sequence[int], **options: Any) -> dict[str, Estimate]:
    """KL(π_θ ‖ π_ref), entropy and length of samples from the policy; see :class:`Scores` for the two estimates."""
    metrics = {
        "samples/entropy_per_token": ratio(list(scores.entropy), list(scores.tokens), groups, **options),
        "samples/length": mean(list(scores.tokens), groups, **options),
    }
    if not np.isnan(scores.kl).any():
        metrics["samples/kl_per_completion"] = mean(list(scores.kl), groups, **options)
        metrics["samples/kl_per_completion_log_ratio"] = mean(list(scores.log_ratios), groups, **options)
        metrics["samples/kl_per_token"] = ratio(list(scores.kl), list(scores.tokens), groups, **options)
    return metrics


def _perplexity(logps: Array, tokens: Array, groups: Sequence[int], options: dict[str, Any]) -> Estimate:
    return bootstrap(lambda i: math.exp(-float(logps[i].sum() / tokens[i].sum())), groups, **options)
