"""Many run folders, read and put together: runs that differ in nothing but their seed are one group."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from halos.config.runs import run_config
from halos.evaluation.statistics import Estimate, over_seeds

_OF_NO_CONSEQUENCE = (
    "seed", "data.source.seed", "output_dir", "resume", "overwrite", "cache_dir", "checkpoint_every", "logger.",
    "sampling.prompts", "trainer.enable_progress_bar", "loss._target_", "claim", "sweep_", "estimate.",
)  # fmt: skip
"""Keys whose values do not make two runs different experiments."""


@dataclass(frozen=True, slots=True)
class Run:
    """One finished run. ``numbers``: ``val/…`` and ``samples/…`` of its summary, ``evaluation/…`` where it was
    evaluated; ``curves``: the rows of ``metrics.csv``; ``rewards`` and ``samples``: what an evaluation left."""

    folder: Path
    seed: int
    config: dict[str, Any]
    numbers: dict[str, float]
    curves: list[dict[str, float]]
    rewards: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    claim: dict[str, Any] | None = None
    """What the run's experiment claims, if it claims anything (:mod:`halos.comparison.claims`)."""
    opponent: str | None = None
    """Whom the judge of its evaluation compared it with."""


@dataclass(slots=True)
class Group:
    """Runs of one experiment over several seeds; ``label`` says what sets it apart from the others."""

    label: str
    runs: list[Run] = field(default_factory=list)

    def over_seeds(self, metric: str) -> Estimate | None:
        """The metric's mean over the runs that have it, with Student's t interval."""
        values = [run.numbers[metric] for run in self.runs if metric in run.numbers]
        return over_seeds(values) if values else None


def read_runs(roots: Sequence[str]) -> tuple[list[Run], list[Path]]:
    """(finished runs in or below the folders, folders of unfinished ones).

    Where they were judged against different opponents, the names of ``evaluation/judge/…`` end with `` against …``.

    Raises ``ValueError`` for a folder that does not exist, if no run has finished, and for a damaged file.
    """
    found: dict[Path, None] = {}
    for root in roots:
        if not Path(root).is_dir():
            raise ValueError(f"runs: no such folder: {root}")
        found |= dict.fromkeys(sorted(file.parent for file in Path(root).rglob("config.yaml")))
    finished = [folder for folder in found if (folder / "summary.json").is_file()]
    if not finished:
        raise ValueError(f"runs: expected finished runs in {', '.join(roots)}, found none")
    runs = [_read(folder) for folder in finished]
    if len({run.opponent for run in runs if run.opponent is not None}) > 1:
        runs = [_against(run) for run in runs]
    return runs, [folder for folder in found if folder not in finished]


def group(runs: Sequence[Run]) -> list[Group]:
    """The runs by experiment, in the order in which they are met.

    Raises ``ValueError`` for two runs of one experiment with the same seed: they are no two draws.
    """
    by_config: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_config[json.dumps(run.config, sort_keys=True)].append(run)
    members = list(by_config.values())
    labels = _labels([some[0].config for some in members])
    groups = [Group(label, sorted(some, key=lambda run: run.seed)) for label, some in zip(labels, members, strict=True)]
    for one in groups:
        for run, other in pairwise(one.runs):
            if run.seed == other.seed:
                raise ValueError(
                    f"runs: expected one run of seed {run.seed} of {one.label}, found {run.folder} and {other.folder}, "
                    "which differ in nothing that counts; leave one out"
                )
    return groups


def _labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    # Keys tell groups apart only within one loss: other losses have other parameters and other settings anyway.
    labels = []
    for config in configs:
        peers = [other for other in configs if other["loss.name"] == config["loss.name"]]
        varied = [key for key in sorted(config) if any(other.get(key) != config[key] for other in peers)]
        labels.append(", ".join([str(config["loss.name"]), *(f"{key}={config[key]}" for key in varied)]))
    return labels


def _read(folder: Path) -> Run:
    config = run_config(folder)
    summary = _json(folder / "summary.json")
    numbers = _numbers("val", summary.get("metrics", {})) | _numbers("samples", summary.get("samples", {}))
    numbers |= _numbers("run", {name: summary[name] for name in ("steps", "train_seconds") if name in summary})
    evaluated = folder / "evaluation"
    opponent = None
    if (evaluated / "evaluation.json").is_file():
        results = _json(evaluated / "evaluation.json")
        numbers |= _numbers("evaluation", {name: found["value"] for name, found in results["metrics"].items()})
        opponent = results.get("win_rate", {}).get("opponent")
    lines = {name: _lines(evaluated / f"{name}.jsonl") for name in ("rewards", "samples")}
    claim: Any = OmegaConf.to_container(config.claim, resolve=True) if config.get("claim") else None
    seed, curves = int(config.seed), _curves(folder / "metrics.csv")
    return Run(folder, seed, of_experiment(config), numbers, curves, **lines, claim=claim, opponent=opponent)


def _against(run: Run) -> Run:
    end = {name: f" against {run.opponent}" for name in run.numbers if name.startswith("evaluation/judge/")}
    return replace(run, numbers={f"{name}{end.get(name, '')}": value for name, value in run.numbers.items()})


def of_experiment(config: Any) -> dict[str, Any]:
    """The flat keys that tell one experiment from another.

    What the rounds of a command have from each other (the last one's model, feedback on its samples) follows from
    their number, so the model is that of the first round and the data are where the prompts come from.
    """
    flat = dict(_flat("", OmegaConf.to_container(config, resolve=True)))
    if flat.get("rounds.round") is not None:
        world = {k.replace(".world", "", 1): v for k, v in flat.items() if k.startswith("data.source.world.")}
        of_round = ("model.path", "model.reference_path", "data.train", *(["data.source."] if world else []))
        flat = {k: v for k, v in flat.items() if not k.startswith(of_round)} | world
    return {key: value for key, value in flat.items() if not key.startswith(_OF_NO_CONSEQUENCE)}


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)


def _numbers(stage: str, found: Mapping[str, Any]) -> dict[str, float]:
    return {f"{stage}/{name}": float(value) for name, value in found.items() if isinstance(value, int | float)}


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, found {error}") from error


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _curves(file: Path) -> list[dict[str, float]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]
