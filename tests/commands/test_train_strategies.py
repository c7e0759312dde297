"""A run over two processes is that of one with twice the batch."""

import json
from functools import partial
from pathlib import Path

import pytest

from halos.training.run_folder import CONTENTS
from tests.fork import run_ranks
from tests.train_runs import LORA, column, run, train_as_rank

pytestmark = pytest.mark.runs


@pytest.mark.ranks
@pytest.mark.parametrize("words", [(), pytest.param(LORA, marks=pytest.mark.slow)], ids=["all weights", "lora"])
def test_two_processes_train_as_one_with_twice_the_batch(words: tuple[str, ...], tmp_path: Path) -> None:
    options = ("sampling.size=4", "sampling.prompts=1", "sampling.kl=true", "sampling.kl_prompts=3", *words)
    one = run(tmp_path / "one", *options)
    both = ("strategy=ddp", "trainer.devices=2", "data.batch_size=2", f"cache_dir={tmp_path}/cache")
    found = run_ranks(partial(train_as_rank, tmp_path / "two", *options, *both))
    for summary in found:
        assert summary["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert summary["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-4)
        assert summary["metrics"]["kl"] > 1e-6
        assert [summary[key] for key in ("world_size", "examples", "tokens")] == [2, one["examples"], one["tokens"]]
    kept = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert kept["train_loss"] == found[0]["train_loss"]
    assert {file.name for file in (tmp_path / "two").iterdir()} == set(CONTENTS) - {"tensorboard", "evaluation"}
    assert list(column(tmp_path / "two", "train/loss")) == list(range(1, one["steps"] + 1))
