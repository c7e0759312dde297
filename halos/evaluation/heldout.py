"""Metrics of rewards on held-out feedback: accuracy, AUC, margin, calibration and length bias."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from halos.data.records.judgement import judgement_of
from halos.data.records.record import Prompt, Record, Reply, prompt_key
from halos.data.views.derive import View, binary, pairs
from halos.data.views.examples import Labelled, Pair
from halos.data.views.selection import Selection
from halos.evaluation.calibration import calibration_error
from halos.evaluation.statistics import Bootstrap, Estimate, Indices
from halos.metrics import TIE, auc
from halos.sampling.scoring import Array, Scores

E = TypeVar("E", Labelled, Pair)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out feedback on completions; equal completions of a prompt are listed once.

    Attributes:
        prompts: the prompt of each completion, [n].
        completions: the replies, [n].
        groups: a number for the prompt of each completion, the same for equal prompts, [n].
        pairs: (index of the chosen completion, index of the rejected one).
        labels: (index of a completion, whether it is desirable).
        report: how many records were converted or left out, by reason.
    """

    prompts: list[Prompt]
    completions: list[Reply]
    groups: list[int]
    pairs: list[tuple[int, int]]
    labels: list[tuple[int, bool]]
    report: Counter[str]


def held_out(
    records: Sequence[Record], selection: Selection | None = None, training: Sequence[Record] | None = None
) -> HeldOut:
    """Derive pairs and labels from held-out records.

    Args:
        records: the held-out records.
        selection: how scores become labels and pairs.
        training: the records whose scores set the median, by default ``records``.

    Raises:
        ValueError: the records have neither pairs nor labels.
    """
    selection = selection or Selection()
    training = records if training is None else training
    report: Counter[str] = Counter()
    prepare = {name: selection.prepare(name, records, training) for name in ("pairs", "binary")}
    paired = _examples("pairs", lambda: pairs(records, prepare["pairs"]), report)
    labelled = _examples("binary", lambda: binary(records, prepare["binary"]), report)
    if not paired and not labelled:
        binary(records, prepare["binary"])  # raises, and its message says why
    of_pairs = [(e.prompt, e.chosen, e.rejected) for e in paired]
    return _listed(of_pairs, [(e.prompt, e.completion, e.desirable) for e in labelled], report)


def answered(records: Sequence[Record], selection: Selection, training: Sequence[Record]) -> HeldOut:
    """List the answers that people gave: labels as labels and preferences as pairs, none made from the other.

    Args:
        records: the records.
        selection: how scores become labels, if they do.
        training: the records whose scores set the median.
    """
    pairs: list[tuple[Prompt, Reply, Reply]] = []
    labels: list[tuple[Prompt, Reply, bool]] = []
    prepare = selection.prepare("binary", records, training)
    for index, record in enumerate(records):
        replies, judgement = [c.reply for c in record.completions], judgement_of(record)
        judged = judgement if prepare is None else prepare(index, judgement)[0]
        pairs += [(record.prompt, replies[better], replies[worse]) for better, worse in record.preferences]
        labels += [
            (record.prompt, replies[c.place], c.desirable) for c in judged.completions if c.desirable is not None
        ]
    return _listed(pairs, labels, Counter())


def _listed(
    pairs: Sequence[tuple[Prompt, Reply, Reply]], labels: Sequence[tuple[Prompt, Reply, bool]], report: Counter[str]
) -> HeldOut:
    # A completion in several pairs is scored once, so each different one gets an index, in order of first appearance.
    uses = [(prompt, reply) for prompt, *sides in pairs for reply in sides]
    uses += [(prompt, reply) for prompt, reply, _ in labels]
    completions: dict[tuple[str, Reply], Prompt] = {}
    for prompt, reply in uses:
        completions.setdefault((prompt_key(prompt), reply), prompt)
    # By key and reply: prompts may hold turns, and the same prompt may be written as text or as one turn.
    index = {completion: n for n, completion in enumerate(completions)}
    group = {key: n for n, key in enumerate(dict.fromkeys(key for key, _ in completions))}
    return HeldOut(
        prompts=list(completions.values()),
        completions=[reply for _, reply in completions],
        groups=[group[key] for key, _ in completions],
        pairs=[(index[prompt_key(p), chosen], index[prompt_key(p), rejected]) for p, chosen, rejected in pairs],
        labels=[(index[prompt_key(p), reply], desirable) for p, reply, desirable in labels],
        report=report,
    )


def _examples(name: str, derive: Callable[[], View[E]], report: Counter[str]) -> Sequence[E]:
    try:
        view = derive()
    except ValueError:  # the records have none of this kind of feedback, but may have the other
        return ()
    report.update({f"{name}: {reason}": count for reason, count in view.report.items()})
    return view.examples


def feedback_metrics(data: HeldOut, rewards: Array, tokens: Array, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """Compute the metrics of rewards on held-out feedback.

    Args:
        data: the feedback.
        rewards: the reward of each completion, β included, [n].
        tokens: the length of each completion, [n].
        bootstrap: makes the intervals.
    """
    of_pairs = _pair_metrics(data, rewards, tokens, bootstrap) if data.pairs else {}
    return of_pairs | (_label_metrics(data, rewards, tokens, bootstrap) if data.labels else {})


def _pair_metrics(data: HeldOut, rewards: Array, tokens: Array, bootstrap: Bootstrap) -> dict[str, Estimate]:
    chosen, rejected = (np.array(side) for side in zip(*data.pairs, strict=True))
    groups = [data.groups[i] for i in chosen]
    margins = rewards[chosen] - rewards[rejected]
    # A policy that still is its reference has margins of rounding alone, which would count as right or wrong by chance.
    correct = np.where(np.abs(margins) <= TIE, 0.5, margins > 0)
    longer = np.where(tokens[chosen] == tokens[rejected], 0.5, tokens[chosen] > tokens[rejected])
    return {
        "rewards/accuracies": bootstrap.rate(correct, groups),
        "rewards/margins": bootstrap.mean(margins, groups),
        "rewards/ece": bootstrap.interval(lambda i: calibration_error(margins[i]), groups),
        "length/chosen_longer": bootstrap.rate(longer, groups),
    }


def _label_metrics(data: HeldOut, rewards: Array, tokens: Array, bootstrap: Bootstrap) -> dict[str, Estimate]:
    completion, desirable = (np.array(column) for column in zip(*data.labels, strict=True))
    groups = np.array(data.groups)[completion]
    # By label, not by completion: a completion that several people judged counts once for each of them.
    reward, length = rewards[completion], tokens[completion]

    def area(i: Indices) -> float:
        value = auc(torch.from_numpy(reward[i]), torch.from_numpy(desirable[i]))
        return math.nan if value is None else value  # a draw may have one class only

    metrics = {"rewards/auc": bootstrap.interval(area, groups.tolist())}
    for name, side in (("chosen", desirable), ("rejected", ~desirable)):
        if side.any():
            own_groups = groups[side].tolist()
            metrics[f"rewards/{name}"] = bootstrap.mean(reward[side], own_groups)
            metrics[f"length/{name}"] = bootstrap.mean(length[side], own_groups)
    metrics["length/reward_correlation"] = bootstrap.correlation(reward, length, groups.tolist())
    return metrics


def likelihood_metrics(data: HeldOut, scores: Scores, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """Compute the perplexity of what people liked, and entropy, divergence and log-ratios of all completions."""
    # Perplexity of what people disliked says nothing good or bad of a policy that is trained away from it.
    liked = sorted({i for i, desirable in data.labels if desirable} | {i for i, _ in data.pairs})
    groups, tokens = [data.groups[i] for i in liked], scores.tokens[liked]
    metrics = _per_token("data/divergence", scores, data.groups, bootstrap)
    for name, logps in (("perplexity", scores.logps), ("perplexity_reference", scores.reference)):
        if liked and not np.isnan(logps).any():
            metrics[f"data/{name}"] = _perplexity(logps[liked], tokens, groups, bootstrap)
    if scores.has_reference:
        metrics["data/log_ratio"] = bootstrap.mean(scores.log_ratios, data.groups)
    return metrics


def on_policy_metrics(
    scores: Scores, groups: Sequence[int], bootstrap: Bootstrap, *, plain: bool = True
) -> dict[str, Estimate]:
    """Compute KL(π_θ ‖ π_ref), entropy and length of the policy's samples.

    Args:
        scores: of the samples; see :class:`Scores` for the two estimates, ``samples/kl`` and ``samples/log_ratio``.
        groups: the prompt of each sample, by number.
        bootstrap: makes the intervals.
        plain: whether the samples were drawn from π_θ as it is, at temperature 1 and without top-p. From other samples
            the same mean is no KL, and is called ``samples/divergence``.
    """
    metrics = _per_token("samples/kl" if plain else "samples/divergence", scores, groups, bootstrap)
    metrics["samples/length"] = bootstrap.mean(scores.tokens, groups)
    if scores.has_reference:
        metrics["samples/log_ratio"] = bootstrap.mean(scores.log_ratios, groups)
    return metrics


def _per_token(divergence: str, scores: Scores, groups: Sequence[int], bootstrap: Bootstrap) -> dict[str, Estimate]:
    # Per token means over all tokens, not the mean of each completion's mean, which would favour short completions.
    stage = divergence.partition("/")[0]
    metrics = {f"{stage}/entropy_per_token": bootstrap.ratio(scores.entropy, scores.tokens, groups)}
    if scores.has_reference:
        metrics[divergence] = bootstrap.mean(scores.divergence, groups)
        metrics[f"{divergence}_per_token"] = bootstrap.ratio(scores.divergence, scores.tokens, groups)
    return metrics


def _perplexity(logps: Array, tokens: Array, groups: Sequence[int], bootstrap: Bootstrap) -> Estimate:
    return bootstrap.interval(lambda i: math.exp(-float(logps[i].sum() / tokens[i].sum())), groups)
