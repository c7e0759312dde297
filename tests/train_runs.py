"""Whole training runs on the toy world for other tests, and what they compare of them."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hydra.utils import get_class
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file

import halos.commands.assembly
from halos.commands.train import train
from tests.configs import MIXTURES, compose

QUICK = (
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "data.source.size=12",
    "data.source.val_size=4",
    "data.batch_size=4",
    "trainer.max_epochs=1",
    "data.length_groups=1",
    "trainer.val_check_interval=1.0",
    "sampling.max_new_tokens=20",
    "sampling.prompts=0",
    "sampling.kl=false",
    "sampling.size=0",
    "logger=none",
)
"""12 prompts with two completions each: a pass of 6 steps, or of 3 over pairs."""

SPEED = ("train/examples_per_second", "train/tokens_per_second")


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    files = any(word.startswith("data=") for word in overrides)
    quick = [word for word in QUICK if not (files and word.startswith("data.source."))]
    return train(compose(*quick, f"output_dir={folder}", *overrides))


def train_as_rank(folder: Path, *overrides: str) -> dict[str, Any]:
    # Lightning reads the rank when it is imported, which the server that forks the ranks has done before.
    rank_zero_only.rank = int(os.environ["LOCAL_RANK"])  # type: ignore[attr-defined]
    return run(folder, *overrides)


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what a clock said."""
    with (folder / "metrics.csv").open(newline="") as stream:
        return [{name: value for name, value in row.items() if name not in SPEED} for row in csv.DictReader(stream)]


def column(folder: Path, name: str) -> dict[int, float]:
    return {int(row["step"]): float(row[name]) for row in table(folder) if row.get(name)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    assert {k: v.tolist() for k, v in weights(one).items()} == {k: v.tolist() for k, v in weights(other).items()}


def assert_same_run(one: tuple[Path, dict], other: tuple[Path, dict]) -> None:
    """Bitwise: losses, everything else that was logged, and weights."""
    (folder, summary), (other_folder, other_summary) = one, other
    for key in ("train_loss", "metrics", "steps", "examples", "tokens"):
        assert summary[key] == other_summary[key], key
    assert table(folder) == table(other_folder)
    assert_same_weights(folder, other_folder)


SUMMARY = [
    "loss",
    "strategy",
    "precision",
    "seed",
    "world_size",
    "steps",
    "exported_step",
    "examples",
    "tokens",
    "train_seconds",
    "reference_seconds",
    "peak_rss_mb",
    "peak_gpu_mb",
    "metrics",
    "versions",
    "commit",
    "command",
    "paths",
    "samples",
    "train_loss",
]


def is_paired(loss: str) -> bool:
    node = compose(f"loss={loss}").loss
    # A mixture has the view of its parts, and loss=halo that of its key.
    return loss in MIXTURES or (node.get("view") or get_class(node._target_).view) == "pairs"  # type: ignore[attr-defined]


RESUMABLE = (
    *("model.dropout=0.1", "checkpoint.every=2", "trainer.val_check_interval=0.5", "optim.lr=1e-2"),
    *("sampling.kl=true", "sampling.validations=99"),
)
"""Dropout, so that a run resumes only if its randomness does; validation after 3 of 6 steps."""
LORA = ("model.lora.enabled=true", "model.reference=adapter", "optim.eps=1e-4")
"""With the toy world's eps of 1e-2 so few steps would hardly move an adapter."""


class StopAt(pl.Callback):
    """Fails in the hook of this name, once so many optimizer steps are done."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self.stop)

    def stop(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


def run_until(hook: str, step: int, folder: Path, *overrides: str) -> None:
    """A run that is interrupted in this hook, behind so many optimizer steps."""
    callbacks = halos.commands.assembly._callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halos.commands.assembly, "_callbacks", lambda *pieces: [*callbacks(*pieces), StopAt(hook, step)])
        with pytest.raises(InterruptedError):
            run(folder, *overrides)
    assert not (folder / "summary.json").exists()


GOOD_ROW = {"prompt": "i bought a lamp.", "completion": "thanks for asking.", "label": True}
BAD_ROW = {"prompt": "i bought a desk.", "completion": "go away.", "label": False}
LABELS = [GOOD_ROW, BAD_ROW]


def jsonl(*rows: Any) -> str:
    return "".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
