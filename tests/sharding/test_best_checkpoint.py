"""Under ``strategy=fsdp`` the exported model is that of the best checkpoint too, one file or a folder of shards."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.fork import run_ranks
from tests.train_runs import run, train_as_rank

pytestmark = [pytest.mark.ranks, pytest.mark.runs, pytest.mark.slow]

WORDS = (
    *("trainer.max_steps=4", "trainer.val_check_interval=2", "optim.lr=1e-2", "optim.eps=1e-4", "checkpoint.every=99"),
    *("checkpoint.best=val/logps/rejected", "checkpoint.export=best", "checkpoint.keep=1"),
)
TWO = ("strategy=fsdp", "trainer.devices=2", "data.batch_size=2")


def runs_on_a_rank(folder: Path) -> list[dict[str, Any]]:
    sharded = "strategy.trainer.sharded_checkpoints=true"
    return [train_as_rank(folder / "file", *WORDS, *TWO), train_as_rank(folder / "shards", *WORDS, *TWO, sharded)]


def test_the_best_model_is_that_of_one_device(tmp_path: Path) -> None:
    expected = run(tmp_path / "one", *WORDS)
    last = run(tmp_path / "last", *WORDS, "checkpoint.export=last")
    assert (expected["exported_step"], last["exported_step"]) == (2, 4)
    for summaries in run_ranks(partial(runs_on_a_rank, tmp_path), timeout=400):
        assert [summary["exported_step"] for summary in summaries] == [2, 2]
    model = {name: load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "last")}
    assert (tmp_path / "shards" / "checkpoints" / "best.ckpt").is_dir()
    for name in ("file", "shards"):
        exported = load_file(tmp_path / name / "model" / "model.safetensors")
        to_best, to_last = (
            max((weight - model[other][key]).abs().max().item() for key, weight in exported.items())
            for other in ("one", "last")
        )
        assert to_best < 1e-4
        assert to_last > 1e-3
