"""Whole runs of a mixture whose parts take several views."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fork import run_ranks
from tests.train_runs import LORA, RESUMABLE, assert_same_run, column, run, run_until, train_as_rank

KTO = ("+loss.parts.kto={_target_: halos.objectives.KTO, _partial_: true}", "+loss.weights.kto=0.5")
PAIRS = "data.source.feedback=pairs"
KTO_DPO = ("loss=mix", PAIRS, *KTO, "~loss.parts.sft", "~loss.weights.sft")
KTO_SFT = ("loss=mix", *KTO, "~loss.parts.dpo", "~loss.weights.dpo")

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, *RESUMABLE, *KTO_DPO)


def test_both_parts_are_trained_and_logged(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole
    # 12 records, each a pair and two labelled completions.
    assert (summary["steps"], summary["examples"]) == (3, 12)
    assert {"loss/kto", "loss/dpo", "kto/z0", "rewards/accuracies"} <= summary["metrics"].keys()
    total, dpo, kto = (column(folder, f"train/{name}") for name in ("loss", "loss/dpo", "loss/kto"))
    assert total.keys() == {1, 2, 3}
    assert [total[step] for step in total] == pytest.approx([dpo[step] + kto[step] for step in total], rel=1e-5)
    counts = json.loads((folder / "data_report.json").read_text())["splits"]["train"]["counts"]
    assert {name: counts[name] for name in ("examples", "pairs: examples", "binary: examples")} == {
        "examples": 12,
        "pairs: examples": 12,
        "binary: examples": 24,
    }


def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    words = (*RESUMABLE, *KTO_DPO)
    run_until("on_train_batch_start", 2, tmp_path, *words)
    assert_same_run((tmp_path, run(tmp_path, *words, "resume=auto")), whole)


def test_the_pairs_of_a_step_are_those_of_dpo_alone(tmp_path: Path) -> None:
    """With a part of weight 0 beside it, DPO has the loss that it has alone."""
    run(tmp_path / "alone", "loss=dpo", PAIRS)
    run(tmp_path / "mixed", *KTO_DPO, "loss.weights.kto=0")
    alone, mixed = column(tmp_path / "alone", "train/loss"), column(tmp_path / "mixed", "train/loss/dpo")
    assert mixed == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("words", [KTO_DPO, pytest.param(KTO_SFT, marks=pytest.mark.slow)])
def test_every_kind_of_reference_gives_the_same_run(words: tuple[str, ...], tmp_path: Path) -> None:
    for common, kinds in (((), ("cached", "live")), (LORA, ("cached", "adapter"))):
        losses = []
        for kind in kinds:
            folder = tmp_path / f"{len(common)}-{kind}"
            losses.append(run(folder, *words, *common, f"model.reference={kind}")["train_loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_padded_rows_give_the_run_of_packed_ones(tmp_path: Path) -> None:
    losses = [run(tmp_path / word, *KTO_SFT, f"data.packing={word}")["train_loss"] for word in ("true", "false")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_are_one_device(tmp_path: Path) -> None:
    one = run(tmp_path / "one", *KTO_SFT)
    both = ("strategy=ddp", "trainer.devices=2", "data.batch_size=2")
    for found in run_ranks(partial(train_as_rank, tmp_path / "two", *KTO_SFT, *both)):
        assert found["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    for name in ("train/loss", "train/loss/kto", "train/loss/sft", "train/grad_norm"):
        assert column(tmp_path / "two", name) == pytest.approx(column(tmp_path / "one", name), rel=1e-4)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.streaming=true", r"^data\.streaming: expected false for a mixture of several views, found true"),
        ("data.stratified=true", r"^data\.stratified: expected false for a mixture of several views, found true"),
        ("data.train_on=all", r"^data\.train_on=all is for losses that imitate .* learns from pairs and binary"),
        ("+loss.data.kto=a", r"^loss\.data: expected data=mix, whose sources have names, found a with data=toy"),
        ("+loss.data.bco=a", r"^loss\.data: expected names among loss\.parts \(dpo, kto\), found bco"),
    ],
)
def test_what_a_mixture_of_views_refuses(word: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *KTO_DPO, word, "trainer.max_steps=2")
