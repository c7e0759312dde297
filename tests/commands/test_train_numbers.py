"""The same numbers, however a run is made: accumulated, packed, on disk or with other memory; and which are logged."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.train_runs import column, run

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("plain"), "trainer.max_steps=3", "optim.lr=1e-2")


@pytest.mark.parametrize("loss", ["sft", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("dpo", "grpo"))])
def test_accumulation_equals_one_large_batch(loss: str, tmp_path: Path) -> None:
    options = (f"loss={loss}", f"data.source.feedback={'pairs' if loss == 'dpo' else 'labels'}")
    whole = run(tmp_path / "1", *options)
    parts = run(tmp_path / "2", *options, "data.batch_size=2", "trainer.accumulate_grad_batches=2")
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5, abs=1e-6)
    assert [parts[key] for key in ("steps", "examples", "tokens")] == [
        whole[key] for key in ("steps", "examples", "tokens")
    ]


def test_another_seed_gives_another_order(plain: dict[str, Any], tmp_path: Path) -> None:
    summary = run(tmp_path, "trainer.max_steps=3", "optim.lr=1e-2", "seed=1", "data.source.seed=0")
    assert summary["train_loss"] != pytest.approx(plain["train_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "option",
    [
        "data.packing=false",
        "data.share_prompts=false",
        "model.head_chunk=null",
        "model.head_chunk=3",
        "model.reference=live",
        "model.gradient_checkpointing=true",
        "model.gradient_checkpointing=selective",
        "data.workers=1",
    ],
)
def test_numbers_do_not_depend_on(option: str, plain: dict[str, Any], tmp_path: Path) -> None:
    other = run(tmp_path, "trainer.max_steps=3", "optim.lr=1e-2", option)
    assert other["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5)
    assert other["metrics"] == pytest.approx(plain["metrics"], rel=1e-3, abs=1e-5)
    assert other["tokens"] == plain["tokens"]


def test_statistics_of_scored_tokens_are_logged_where_asked_for(plain: dict[str, Any], tmp_path: Path) -> None:
    words = ("trainer.max_steps=3", "trainer.val_check_interval=1", "model.statistics=[entropy,token_accuracy]")
    summary = run(tmp_path, "optim.lr=1e-2", *words)
    assert summary["train_loss"] == plain["train_loss"]
    assert set(summary["metrics"]) == {*plain["metrics"], "entropy", "token_accuracy"}
    for split in ("train", "val"):
        losses, *found = (column(tmp_path, f"{split}/{name}") for name in ("loss", "entropy", "token_accuracy"))
        assert all(values.keys() == losses.keys() for values in found)
        entropies, accuracies = (values.values() for values in found)
        assert all(0 < value < math.log(100) for value in entropies)
        assert all(0.1 < value < 1 for value in accuracies)


def test_max_epochs_counts_passes_over_the_data(tmp_path: Path) -> None:
    summary = run(tmp_path, "trainer.max_epochs=2", "data.batch_size=5")
    assert summary["steps"] == len(summary["train_loss"]) == math.ceil(2 * 24 / 5)
    assert list(column(tmp_path, "train/lr").values())[-1] > 0
