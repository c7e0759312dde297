"""A run over two processes is that of one with twice the batch."""

import json
import random
from functools import partial
from pathlib import Path

import pytest

from halos.toy.feedback import behaviour_completion
from halos.toy.world import toy_prompts
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


def _conversations(file: Path) -> Path:
    # Eight conversations of which each turn has two replies, one of which is continued; the turns are long enough to
    # be shared by the examples after them.
    rows = []
    for number, first in enumerate(toy_prompts(8, seed=0)):
        turns: list[dict[str, str]] = [{"role": "user", "content": " ".join([first] * 5)}]
        for depth in range(3):
            rng = random.Random(f"{number} {depth}")
            replies = [" ".join([behaviour_completion(first, rng)] * 3) for _ in range(2)]
            for label, text in zip((True, False), replies, strict=True):
                rows.append({"prompt": list(turns), "completion": text, "label": label})
            turns += [{"role": "assistant", "content": replies[depth % 2]}, {"role": "user", "content": first}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
@pytest.mark.ranks
def test_two_processes_share_the_turns_of_conversations_as_one_does(tmp_path: Path) -> None:
    file = _conversations(tmp_path / "trees.jsonl")
    lengths = ("data.max_length=400", "data.max_prompt_length=350")
    options = ("data=files", f"data.train={file}", "data.val_size=0", *lengths, "data.keep_together=4")
    one = run(tmp_path / "one", *options, "data.batch_size=8")
    alone = run(tmp_path / "alone", *options, "data.batch_size=8", "data.share_prompts=false")
    assert one["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-5)
    both = ("strategy=ddp", "trainer.devices=2", "data.batch_size=4", f"cache_dir={tmp_path}/cache")
    for summary in run_ranks(partial(train_as_rank, tmp_path / "two", *options, *both)):
        assert summary["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert summary["tokens"] == one["tokens"]


@pytest.mark.slow
@pytest.mark.ranks
def test_fewer_sampled_prompts_than_processes_do_not_hang(tmp_path: Path) -> None:
    options = ("sampling.kl=true", "sampling.kl_prompts=1", "trainer.max_steps=2", "trainer.limit_val_batches=1")
    one = run(tmp_path / "one", *options)
    both = ("strategy=ddp", "trainer.devices=2", "data.batch_size=2", f"cache_dir={tmp_path}/cache")
    for summary in run_ranks(partial(train_as_rank, tmp_path / "two", *options, *both)):
        assert summary["metrics"]["kl"] == pytest.approx(one["metrics"]["kl"], rel=1e-3, abs=1e-5)
