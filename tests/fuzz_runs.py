"""Mutated run folders: each is read, built from or refused in one line; nothing in them runs, and none takes long.

python -m tests.fuzz_runs [COUNT] [SEED]    (from the repository; 10,000 take about half an hour)
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from halos.commands.builders import build_objective
from halos.commands.held_data import read_data
from halos.comparison.claims import decide
from halos.comparison.page import page
from halos.comparison.runs import group, read_runs
from halos.comparison.tables import as_csv, compare_groups
from halos.config.nodes import build, plain
from halos.config.runs import run_config
from halos.policy.lookup import find_policy, reference_of
from halos.sharding.consolidate import consolidate
from halos.toy.model import REFERENCE_DIR
from halos.training.checkpoint_files import IDENTITY, check_identity, check_intact
from tests.campaign import attempt, main
from tests.commands.test_compare import run as comparable_run
from tests.configs import compose
from tests.fuzz_judge import paths
from tests.sharding.test_reading import sharded

SECONDS = 20
"""The limit of a folder; most take less than a tenth."""
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 0.5, 10**30, float("nan"), float("inf"), "", "x", "a.b", "\x1b]0;t\x07\u202e", "\0", [], {},
    [[]], {"a": {}}, "1e999", [None] * 100, "???", "${oc.env:HOME}", "${", "${seed}", "/etc/passwd", "../..",
)  # fmt: skip
TARGETS = (
    "os.system", "subprocess.call", "numpy.load", "torch.load", "torch.storage._load_from_bytes", "builtins.eval",
    "halos.objectives.KTO", "halos.objectives.KTO.load_from_checkpoint", "halos.data.Selection", "halos.toy.ToySource",
    "halos.data.OnPolicySource", "halos.cli.main", "halos.policy.ModelSpec", "halos", "", 3, "a b", "halos.optim.Optim",
)  # fmt: skip
ODD_TEXTS = (
    "\n&a [*a]", "!!binary aGk=", "[" * 5000, "*b", "!x y", "- \t", "\ufeff", "9" * 5000, "1:2:3", "0x" + "f" * 500,
)  # fmt: skip
ODD_BYTES = (
    b"\xff", b"\0", b"\x80", b"c", b"R", b"\x93", b"(", b"t", b"2", b"\x85", b"{", b"\n", b'"', b":", b"cos\nsystem\n",
)  # fmt: skip
KINDS = {"config": 6, "config text": 2, "summary": 3, "summary bytes": 1, "index": 3, "shards": 2}
KINDS |= {"results": 3, "results bytes": 1, "checkpoint": 2}
"""What is mutated, and how often; more than half of the files are still read."""


def template(folder: Path) -> Path:
    """A finished run with everything that other commands read of it."""
    words = ("data=toy", "data.source.size=8", "data.source.val_size=4", f"output_dir={folder}")
    config = plain(compose("loss=kto", "model=toy", *words))
    comparable_run(folder, "kto", 0, 0.5)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    (folder / "model").symlink_to(REFERENCE_DIR)
    sharded(folder / "checkpoints" / "step_3.ckpt")
    torch.save({IDENTITY: {"loss": "kto"}, "global_step": 4, "state_dict": {}}, folder / "checkpoints" / "step_4.ckpt")
    results = folder / "evaluation"
    results.mkdir()
    metric = {"value": 0.5, "low": 0.4, "high": 0.6}
    (results / "evaluation.json").write_text(json.dumps({"metrics": {"judge/win_rate": metric}}))
    (results / "rewards.jsonl").write_text('{"reward": 0.5, "desirable": true}\n{"reward": -0.5, "desirable": false}\n')
    (results / "samples.jsonl").write_text('{"prompt": "p", "completions": ["c", "d"]}\n')
    return folder


def mutate(value: dict[str, Any], draw: random.Random, marker: Path) -> None:
    """Change one place of nested values."""
    *path, last = draw.choice(paths(value))
    parent: Any = value
    for key in path:
        parent = parent[key]
    kind = draw.choice(("value", "value", "target", "delete", "add"))
    if kind == "value":
        parent[last] = deepcopy(draw.choice(ODD_VALUES))
    elif kind == "target":
        payload: Any = {"_target_": draw.choice(TARGETS), "command": f"touch {marker}", "args": ["touch", str(marker)]}
        parent[last] = draw.choice((payload, [payload], payload | {"_partial_": True, "_args_": [f"touch {marker}"]}))
    elif kind == "delete":
        del parent[last]
    elif isinstance(parent, dict):
        parent[draw.choice(("_target_", "_args_", "extra", "_recursive_"))] = deepcopy(
            draw.choice(ODD_VALUES + TARGETS)
        )


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """Change one to three places of a file."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(data) + 1)
        data = data[:at] + draw.choice((*ODD_BYTES, bytes([draw.randrange(256)]))) + data[at + draw.randint(0, 2) :]
    return data[: draw.randrange(len(data) + 1)] if draw.random() < 0.1 else data


def write_mutated(run: Path, draw: random.Random, marker: Path) -> str:
    """Mutate one file of a run, and return the kind of the mutation."""
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    config, summary = run / "config.yaml", run / "summary.json"
    if kind in ("config", "summary"):
        file = config if kind == "config" else summary
        value = yaml.safe_load(file.read_text())
        for _ in range(draw.choice((1, 1, 2, 3))):
            if paths(value):
                mutate(value, draw, marker)
        file.write_text(yaml.safe_dump(value) if kind == "config" else json.dumps(value))
    elif kind == "results":
        file = draw.choice(list((run / "evaluation").iterdir()))
        first, *others = file.read_text().splitlines()
        value = json.loads(first)
        mutate(value, draw, marker)
        file.write_text("\n".join((json.dumps(value), *others)))
    elif kind == "config text":
        lines = config.read_text().splitlines()
        at = draw.randrange(len(lines))
        lines[at] = f"{lines[at].partition(':')[0]}: {draw.choice(ODD_TEXTS)}"
        config.write_text("\n".join(lines))
    else:
        folder = run / "checkpoints" / "step_3.ckpt"
        file = summary if kind == "summary bytes" else folder / ".metadata"
        if kind == "shards":
            file = next(folder.glob("*.distcp"))
        elif kind == "checkpoint":
            file = folder.with_name("step_4.ckpt")
        elif kind == "results bytes":
            file = draw.choice([run / "metrics.csv", *(run / "evaluation").iterdir()])
        file.write_bytes(mutated_bytes(file.read_bytes(), draw))
    return kind


def read(run: Path, kind: str, output: Path) -> Counter[str]:
    """Do with a run what the commands do that read it; a ``ValueError`` is their one line."""
    outcomes: Counter[str] = Counter()

    def compare() -> None:
        as_csv(compare_groups(group(read_runs([str(run)])[0]), None, None))

    def show() -> None:
        runs = read_runs([str(run)])[0]
        groups = group(runs)
        page("t", groups, compare_groups(groups, None, None), 0, decide(runs))

    def resume() -> None:
        check_intact(run / "checkpoints" / "step_4.ckpt")
        check_identity(run / "checkpoints" / "step_4.ckpt", {"loss": "kto"})

    def evaluate() -> None:
        policy = find_policy("policy", str(run))
        read_data(None, policy, "val", 0)
        reference_of(policy, None)

    def export() -> None:
        cfg: DictConfig = run_config(run)
        build_objective(cfg, build(cfg.optim))
        build(cfg.model)

    def join() -> None:
        consolidate(run / "checkpoints" / "step_3.ckpt", output)

    commands = {"index": (join,), "shards": (join,), "checkpoint": (resume,)}
    commands |= dict.fromkeys(("results", "results bytes"), (show,))
    for command in commands.get(kind, (compare, evaluate, export)):
        try:
            command()
        except (ValueError, OmegaConfBaseException):
            outcomes[f"{command.__name__}: refused"] += 1
        else:
            outcomes[f"{command.__name__}: done"] += 1
    output.unlink(missing_ok=True)
    return outcomes


def fuzz(count: int, seed: int, folder: Path) -> Counter[str]:
    """Read ``count`` mutated runs. Returns how many were read to the end and refused, by what read them."""
    outcomes: Counter[str] = Counter()
    base, marker = template(folder / "base"), folder / "ran"
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        run = folder / "run"
        shutil.copytree(base, run, symlinks=True)
        kind = write_mutated(run, draw, marker)
        with attempt(f"run {number} ({kind})", seed, marker, SECONDS):
            outcomes += read(run, kind, folder / "whole.ckpt")
        shutil.rmtree(run)
    return outcomes


if __name__ == "__main__":
    main(fuzz)
