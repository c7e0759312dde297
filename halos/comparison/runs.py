"""Reads run folders and groups the runs: those that differ only in their seed are one group."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from halos.checks import is_number
from halos.config.nodes import Node, flatten
from halos.config.runs import CONFIG, saved_run
from halos.evaluation.statistics import LEVEL, Estimate, over_seeds

_IGNORED = (
    "seed", "data.source.seed", "output_dir", "resume", "overwrite", "cache_", "checkpoint.every", "checkpoint.keep",
    "logger.", "sampling.prompts", "sampling.validations", "sampling.kl", "trainer.enable_progress_bar",
    "loss._target_", "claim", "hub.", "sweep_", "estimate.",
)  # fmt: skip
"""Beginnings of keys whose values do not make two runs different experiments."""
LARGEST = 1e100
"""Numbers from here on, and what is infinite or not defined, are left out: no figure can show them."""


@dataclass(frozen=True, slots=True)
class Run:
    """One finished run.

    Attributes:
        folder: the run's folder.
        seed: its seed.
        config: the flat keys that tell its experiment from others, see :func:`experiment_keys`.
        numbers: ``val/…``, ``samples/…`` and ``run/…`` of its summary; ``evaluation/…`` where it was evaluated.
        curves: the rows of ``metrics.csv``.
        rewards: the lines of the ``rewards.jsonl`` that an evaluation has written: ``reward`` and ``desirable``.
        samples: the lines of its ``samples.jsonl``: ``prompt`` and ``completions``.
        claim: what the run's experiment claims, if anything (:mod:`halos.comparison.claims`).
        opponent: whom the judge of its evaluation compared it with.
    """

    folder: Path
    seed: int
    config: Node
    numbers: dict[str, float]
    curves: list[dict[str, float]] = field(default_factory=list)
    rewards: list[Node] = field(default_factory=list)
    samples: list[Node] = field(default_factory=list)
    claim: Node | None = None
    opponent: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """The runs of one experiment over several seeds; ``label`` names what sets it apart from the other groups."""

    label: str
    runs: list[Run]

    def over_seeds(self, metric: str) -> Estimate | None:
        """The metric's mean over the runs that have it, with Student's t interval; None if no run has it."""
        values = list(self.by_seed(metric).values())
        return over_seeds(values) if values else None

    def by_seed(self, metric: str) -> dict[int, float]:
        """The metric of the runs that have it, by their seed."""
        return {run.seed: run.numbers[metric] for run in self.runs if metric in run.numbers}


def paired_difference(values: Mapping[int, float], base: Mapping[int, float], level: float = LEVEL) -> Estimate | None:
    """Estimate the mean difference over the seeds that both have; None if they share no seed.

    Pairing removes the spread that both share, because runs of a seed see the same data in the same order.

    Args:
        values: the metric of one kind of runs, by seed.
        base: the metric of the runs that they are compared with, by seed.
        level: of the interval.
    """
    differences = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    return over_seeds(differences, level) if differences else None


def read_runs(roots: Sequence[str]) -> tuple[list[Run], list[Path]]:
    """Read all runs in or below some folders.

    Where runs were judged against different opponents, the names of their metrics ``evaluation/judge/…`` end with
    `` against …``, so that they are not averaged.

    Returns:
        The finished runs, and the folders of unfinished ones.

    Raises:
        ValueError: a folder does not exist, no run has finished, or a file is damaged.
    """
    folders: dict[Path, None] = {}
    for root in roots:
        if not Path(root).is_dir():
            raise ValueError(f"runs: no such folder: {root}")
        folders |= dict.fromkeys(sorted(file.parent for file in Path(root).rglob(CONFIG)))
    # A run writes its summary last, so a folder with one is complete.
    finished = [folder for folder in folders if (folder / "summary.json").is_file()]
    if not finished:
        raise ValueError(f"runs: expected finished runs in {', '.join(roots)}, found none")
    runs = [_read(folder) for folder in finished]
    if len({run.opponent for run in runs if run.opponent is not None}) > 1:
        runs = [_with_opponent_in_names(run) for run in runs]
    return runs, [folder for folder in folders if folder not in finished]


def group(runs: Sequence[Run]) -> list[Group]:
    """Group runs by experiment, in order of first appearance; equal rounds 0 of a seed count once.

    Raises:
        ValueError: two runs of one experiment have the same seed. They would count as two independent draws.
    """
    # As JSON text with sorted keys, since configurations hold lists and cannot be hashed.
    by_config: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        config_runs = by_config[json.dumps(run.config, sort_keys=True)]
        # A sweep with before=sft trains the same round 0 once for each loss.
        if not (run.folder.name == "round0" and any(other.seed == run.seed for other in config_runs)):
            config_runs.append(run)
    members = [sorted(config_runs, key=lambda run: run.seed) for config_runs in by_config.values()]
    labels = _labels([config_runs[0].config for config_runs in members])
    for label, config_runs in zip(labels, members, strict=True):
        for run, other in pairwise(config_runs):
            if run.seed == other.seed:
                found = f"{run.folder} and {other.folder}, which differ in nothing that counts; leave one out"
                raise ValueError(f"runs: expected one run of seed {run.seed} of {label}, found {found}")
    return [Group(label, config_runs) for label, config_runs in zip(labels, members, strict=True)]


def _labels(configs: Sequence[Node]) -> list[str]:
    # Only keys that vary among the groups of the same loss: other losses have other parameters anyway.
    labels = []
    for config in configs:
        peers = [other for other in configs if other["loss.name"] == config["loss.name"]]
        varied = [key for key in sorted(config) if any(other.get(key) != config[key] for other in peers)]
        labels.append(", ".join([str(config["loss.name"]), *(f"{key}={config[key]}" for key in varied)]))
    return labels


def _read(folder: Path) -> Run:
    config = saved_run(folder)
    try:
        run = _run_of(folder, config)
        json.dumps(run.config, sort_keys=True)  # as runs are grouped by
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, csv.Error) as error:
        # Files of another program, or changed by hand: their values have types that no run writes.
        raise ValueError(f"{folder}: expected the files of a run, found others: {error!r}") from error
    if "loss.name" not in run.config:
        raise ValueError(f"{folder / CONFIG}: expected loss.name, found none")
    return run


def _run_of(folder: Path, config: Node) -> Run:
    summary = _json(folder / "summary.json")
    file = folder / "evaluation" / "evaluation.json"
    results = _json(file) if file.is_file() else {"metrics": {}}
    stages = {
        "val": summary.get("metrics", {}),
        "samples": summary.get("samples", {}),
        "run": {name: summary.get(name) for name in ("steps", "train_seconds")},
        "evaluation": {name: metric["value"] for name, metric in results["metrics"].items()},
    }
    # Undefined estimates are null in the file, and left out.
    numbers = {
        f"{stage}/{name}": float(value)
        for stage, values in stages.items()
        for name, value in values.items()
        if isinstance(value, int | float) and abs(value) < LARGEST
    }
    curves = _curves(folder / "metrics.csv")
    rewards = _rows(file.with_name("rewards.jsonl"), _is_reward, "a reward and whether it is desirable")
    # As floats: a figure cannot show whole numbers of any size.
    rewards = [row | {"reward": float(row["reward"])} for row in rewards if abs(row["reward"]) < LARGEST]
    samples = _rows(file.with_name("samples.jsonl"), _is_sample, "a prompt and its completions")
    opponent = results.get("win_rate", {}).get("opponent")
    claim, keys = config.get("claim") or None, experiment_keys(config)
    return Run(folder, int(config["seed"]), keys, numbers, curves, rewards, samples, claim, opponent)


def _with_opponent_in_names(run: Run) -> Run:
    numbers = {
        f"{name} against {run.opponent}" if name.startswith("evaluation/judge/") else name: value
        for name, value in run.numbers.items()
    }
    return replace(run, numbers=numbers)


def experiment_keys(config: Node) -> Node:
    """Keep the flat keys of a run's configuration that tell one experiment from another.

    In a command of several rounds, each round starts from the last one's model and learns from feedback on its samples.
    Both follow from the number of the round, so the paths are left out, and the data source is that of the prompts.
    """
    flat = flatten(config)
    # Runs outside of rounds have the key too, with null.
    if flat.get("rounds.round") is not None:
        source = "data.source."
        world = {k.replace(".world", "", 1): v for k, v in flat.items() if k.startswith(f"{source}world.")}
        replaced = ("model.path", "model.reference_path", "data.train", *([source] if world else []))
        flat = {key: value for key, value in flat.items() if not key.startswith(replaced)} | world
    return {key: value for key, value in flat.items() if not key.startswith(_IGNORED)}


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON, found {error}") from error


def _curves(file: Path) -> list[dict[str, float]]:
    try:
        rows = [{name: _number(value) for name, value in row.items() if value} for row in csv.DictReader(_lines(file))]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{file}: expected numbers, found another text: {error}") from error
    return [{name: value for name, value in row.items() if abs(value) < LARGEST} for row in rows if "step" in row]


def _number(text: str) -> float:
    if len(text) > 100:  # a float has up to 24 characters
        raise ValueError(f"{text[:20]!r}… of {len(text):,} characters")
    return float(text)


def _rows(file: Path, is_row: Callable[[Any], bool], expected: str) -> list[Node]:
    rows: list[Node] = []
    for number, line in enumerate(_lines(file), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}:{number}: expected JSON, found {error}") from error
        if not is_row(row):
            raise ValueError(f"{file}:{number}: expected {expected}, found {line[:60]!r}")
        rows.append(row)
    return rows


def _is_reward(row: Any) -> bool:
    return is_number(row["reward"]) and isinstance(row["desirable"], bool)


def _is_sample(row: Any) -> bool:
    answers = row["completions"]
    return (
        isinstance(answers, list) and bool(answers) and all(isinstance(text, str) for text in (row["prompt"], *answers))
    )


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        return []
    # Not str.splitlines, which also splits at U+2028 and its like: JSON leaves them as they are inside of texts.
    with file.open(newline="", encoding="utf-8") as stream:
        return list(stream)
