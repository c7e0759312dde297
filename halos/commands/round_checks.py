"""What is wrong with rounds, found before the first of them is trained."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from omegaconf import DictConfig

from halos import terminal
from halos.checks import check_whole
from halos.commands.assembly import build_data, build_objective, objective_class
from halos.config.building import build
from halos.data.records.record import Completion, Record
from halos.data.views.derive import VIEWS
from halos.data.views.selection import Selection
from halos.judges.labels import KINDS
from halos.judges.making import make_judge
from halos.objectives.base import Objective
from halos.sampling.engines import Decoding, check_installed

REFERENCES = ("last", "first")
_FAR = 1e9
"""Scores this far apart lie on both sides of any threshold and margin."""


def check_rounds(cfg: DictConfig, of_round: Callable[[int], DictConfig]) -> None:
    """Look at what the rounds are made with; ``of_round``: the configuration of a round by its number.

    Raises ``ValueError`` for a bad configuration, and for feedback that the loss cannot learn from.
    """
    rounds = cfg.rounds
    if "LOCAL_RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise ValueError("rounds: expected one process, which starts those of each round; found ranks started apart")
    check_whole("rounds.count", rounds.count, 1)
    for name, options in (("reference", REFERENCES), ("feedback", KINDS)):
        if rounds[name] not in options:
            raise ValueError(f"rounds.{name}: expected one of {', '.join(options)}; found {rounds[name]!r}")
    _check_adapter(cfg)
    if rounds.count > 1:
        _check_reference(cfg)
    numbers = ([0] if cfg.get("before") else []) + list(range(1, min(rounds.count, 2) + 1))
    objectives = [_objective(of_round(number)) for number in numbers]
    if rounds.count > 1:
        _check_sampling(cfg)
        _check_feedback(cfg, objectives[-1].view)
        _check_judge(cfg)


def _check_adapter(cfg: DictConfig) -> None:
    if cfg.model.lora.enabled and cfg.model.lora.export != "merged":
        raise ValueError("rounds: expected model.lora.export=merged, as the next round starts from the export")
    if cfg.model.lora.path is not None and (cfg.rounds.count > 1 or cfg.get("before")):
        raise ValueError(
            "model.lora.path: expected none with rounds, as the next round starts from the merged export, which holds "
            f"the adapter already; found {cfg.model.lora.path}; merge it into its base and set model.path to that"
        )


def _check_reference(cfg: DictConfig) -> None:
    first = cfg.rounds.reference == "first"
    if first and cfg.model.reference not in ("auto", "cached"):
        raise ValueError(
            "model.reference: expected auto or cached with rounds.reference=first, as the later rounds have another "
            f"model as their reference than they start from; found {cfg.model.reference}"
        )
    if first and cfg.model.random_weights and not cfg.model.reference_path and not cfg.get("before"):
        raise ValueError(
            "rounds.reference: expected last with model.random_weights=true, as the weights that round 1 starts from "
            "are kept nowhere; found first"
        )


def _objective(cfg: DictConfig) -> Objective:
    """The objective of one round, made without weights, as is its model's specification."""
    if not objective_class(cfg.loss).generates:
        raise ValueError(f"rounds: expected a loss whose policy can be sampled, found {cfg.loss.name}")
    build(cfg.model)
    objective = build_objective(cfg, build(cfg.optim))
    objective.check(cfg.trainer.accumulate_grad_batches, None)
    return objective


def _check_sampling(cfg: DictConfig) -> None:
    rounds = cfg.rounds
    if cfg.data.streaming:
        raise ValueError("data.streaming: expected false with rounds, which sample the prompts of all data; found true")
    for name in ("samples", "batch_size", "max_new_tokens", *(["prompts"] if rounds.prompts is not None else [])):
        check_whole(f"rounds.{name}", rounds[name], 1)
    try:
        Decoding(max_new_tokens=rounds.max_new_tokens, temperature=rounds.temperature, top_p=rounds.top_p)
        check_installed(rounds.engine)
    except ValueError as error:
        raise ValueError(f"rounds.{error}") from error


def _check_feedback(cfg: DictConfig, view: str) -> None:
    """The most that a judge can say of two prompts' samples has to make an example of the loss's view."""
    kind, samples = cfg.rounds.feedback, cfg.rounds.samples
    different = samples if cfg.rounds.temperature > 0 else 1
    if kind == "pairs" and different < 2:
        raise ValueError(
            "rounds.samples: expected from 2 on, at a temperature above 0, for rounds.feedback=pairs; found "
            f"rounds.samples={samples} at temperature {cfg.rounds.temperature}"
        )
    records = [_judged(kind, prompt, different) for prompt in range(2)]
    selection: Selection = build(cfg.data.select)
    try:
        VIEWS[view](records, selection.prepare(view, records, records))
    except ValueError as error:
        raise ValueError(
            f"rounds.feedback: expected feedback that loss={cfg.loss.name} can learn from, found {kind} of {different} "
            f"different completions of each prompt: {error}"
        ) from error


def _judged(kind: str, prompt: int, count: int) -> Record:
    """One completion of the first prompt is good, and of the second bad; if there are two, the other is not."""
    good = (prompt == 0, prompt == 1)[:count]
    completions = {
        "binary": [Completion(str(n), desirable=one) for n, one in enumerate(good)],
        "scores": [Completion(str(n), score=_FAR if one else -_FAR) for n, one in enumerate(good)],
        "pairs": [Completion(str(n)) for n in range(len(good))],
    }[kind]
    return Record(str(prompt), str(prompt), tuple(completions), ((0, 1),) if kind == "pairs" else ())


def _check_judge(cfg: DictConfig) -> None:
    if cfg.get("judge") is None:
        raise ValueError("judge: expected judge=truth, judge=reward_model or judge=chat for rounds, found none")
    source = build_data(cfg.data, seed=cfg.seed).source
    track = partial(terminal.track, "asking the judge", shown=False)
    make_judge(cfg.judge, source, device="cpu", precision="32-true", track=track)
