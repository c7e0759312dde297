"""What an evaluation works on, and all that can be refused before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from halos import terminal
from halos.checks import check_number, check_whole
from halos.commands.held_data import read_data
from halos.commands.judge import make_judge
from halos.config.devices import check_place
from halos.evaluation.duels import best_of_data
from halos.evaluation.harness import check_installed
from halos.evaluation.heldout import HeldOut, held_out
from halos.evaluation.statistics import Estimate
from halos.files import write_atomically
from halos.judges.base import CompletionJudge
from halos.policy.lookup import Policy, check_tokenizer, find_policy, reference_of
from halos.sampling.engines import Decoding, check_engine
from halos.sampling.prompts import HeldData


@dataclass(slots=True)
class Evaluation:
    """What one command evaluates, checked before any weights are read."""

    cfg: DictConfig
    policy: Policy
    reference: Policy | None
    opponent: Policy | None
    data: HeldData
    held: HeldOut
    judge: CompletionJudge | None
    decoding: Decoding
    folder: Path
    policy_model: Any = None
    reference_model: Any = None
    results: dict[str, Any] = field(default_factory=dict)

    def save(self, metrics: Mapping[str, Estimate]) -> None:
        """Write what is known by now: a judge that does not answer afterwards costs only itself."""
        self.results["metrics"] = {name: estimate.as_json() for name, estimate in metrics.items()}
        text = json.dumps(self.results, indent=2, allow_nan=False) + "\n"
        write_atomically(self.folder / "evaluation.json", text)

    @property
    def beta(self) -> float:
        """β of the implied rewards."""
        given = self.cfg.beta if self.cfg.beta is not None else self.policy.beta
        return 0.1 if given is None else float(given)

    @property
    def where(self) -> dict[str, Any]:
        """Device and precision."""
        return {"device": self.cfg.device, "precision": self.cfg.precision}


def check_settings(cfg: DictConfig) -> None:
    """Raise ``ValueError`` for the first of the command's own settings that cannot work; reads nothing."""
    for name, least in (("seed", 0), ("batch_size", 1), ("resamples", 1), ("samples", 1), ("max_new_tokens", 1)):
        check_whole(name, cfg[name], least)
    check_whole("size", cfg.size, 0, null=True)
    check_whole("task_limit", cfg.task_limit, 1, null=True)
    if cfg.beta is not None:
        check_number("beta", cfg.beta)
    check_place(cfg.device, cfg.precision)


def prepare(cfg: DictConfig) -> Evaluation:
    """Find the models, read the data and make the judge; the cheapest checks first.

    Raises ``ValueError`` for what cannot work, before weights are read.
    """
    decoding = Decoding(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_p=cfg.top_p)
    policy = find_policy("policy", cfg.policy)
    reference = None if policy.is_classifier else reference_of(policy, cfg.reference)
    if cfg.output is None and policy.run is None:
        raise ValueError("output: expected a folder for the results; only a run's folder has a place for them")
    data = read_data(cfg.get("data"), policy, cfg.split, cfg.seed)
    judge = opponent = None
    if cfg.get("judge") is not None:
        track = partial(terminal.track, "asking the judge", shown=cfg.progress)
        judge = make_judge(cfg.judge, data.source, device=cfg.device, precision=cfg.precision, track=track)
        if cfg.opponent not in ("reference", "data"):
            opponent = find_policy("opponent", cfg.opponent)
        elif cfg.opponent == "reference" and reference is None:
            raise ValueError("opponent: expected reference=MODEL to compare with, found none")
        elif cfg.opponent == "data":
            best_of_data(data.records)  # raises if there is nothing to compare with
    if cfg.tasks:
        check_installed()
    if policy.is_classifier and (judge is not None or cfg.tasks):
        raise ValueError(f"policy: {policy.name} is a reward model: it has no samples to judge and no tasks to do")
    sampled = {"policy"} if judge is None or cfg.opponent == "data" else {"policy", str(cfg.opponent), "opponent"}
    for name, model in (("policy", policy), ("reference", reference), ("opponent", opponent)):
        if model is not None:
            check_tokenizer(name, model)
            if name in sampled and cfg.size != 0 and not policy.is_classifier:
                check_engine(cfg.engine, model, key=name)
    if reference is not None:
        _check_vocabulary(policy, reference)
    held = held_out(data.records, data.selection, data.training)
    folder = Path(cfg.output) if cfg.output is not None else Path(policy.name).expanduser() / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    return Evaluation(cfg, policy, reference, opponent, data, held, judge, decoding, folder)


def _check_vocabulary(policy: Policy, reference: Policy) -> None:
    ours = policy.tokenizer.get_vocab()
    if other := [text for text, i in reference.tokenizer.get_vocab().items() if ours.get(text) != i]:
        raise ValueError(
            f"reference: expected the tokenizer of {policy.name}, found another in {reference.name}: it differs in "
            f"{len(other)} tokens, such as {other[0]!r}"
        )
