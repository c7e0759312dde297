"""The reference point that is the KL of the policy's own samples, in whole runs."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import halos
import halos.reporting.kl_reference
from halos.reporting.policy_replies import policy_replies
from halos.sampling.replies import Reply
from halos.training import PolicyPoint
from tests.fork import run_ranks
from tests.train_runs import LABELS, LORA, column, jsonl, run, train_as_rank

pytestmark = pytest.mark.runs

POINT = ("loss.reference_point=policy", "loss.reference_point_steps=2", "sampling.kl_prompts=5")
FAST = ("optim.lr=1e-2", "optim.eps=1e-6", "model.reference=live")


@torch.no_grad()
def by_hand(objective: Any, prompts: list[tuple[Any, Any]], replies: list[Reply]) -> float:
    """The mean over replies of the summed divergences, one sequence at a time from whole logits in float64."""
    total = 0.0
    for (prompt, _), reply in zip(prompts, replies, strict=True):
        ids = torch.tensor([[*prompt, *reply.ids]])
        models = (objective.trained.policy, objective.trained.reference)
        p, q = (model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for model in models)
        total += float((p.exp() * (p - q)).sum())
    return total / len(replies)


def test_it_is_the_kl_of_replies_sampled_every_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, prompts_of = {}, {}

    def recorded(trainer: Any, objective: Any, tokens: Any, prompts: Any, **options: Any) -> list[Reply]:
        replies = policy_replies(trainer, objective, tokens, prompts, **options)
        objective.eval()
        expected[trainer.global_step] = by_hand(objective, prompts, replies)
        objective.train()
        prompts_of[trainer.global_step] = [ids for ids, _ in prompts]
        return replies

    monkeypatch.setattr("halos.training.policy_point.policy_replies", recorded)
    run(tmp_path, *POINT, *FAST, "trainer.accumulate_grad_batches=2", "trainer.max_epochs=2")
    z0 = column(tmp_path, "train/z0")
    # Step n trains with what was measured after n − 1 steps, and the next one with the same.
    assert [*expected] == [0, 2, 4]
    assert z0 == pytest.approx({step: expected[(step - 1) // 2 * 2] for step in range(1, 7)}, rel=1e-4, abs=1e-6)
    assert expected[4] > 1e-3
    assert prompts_of[0] != prompts_of[2]  # drawn anew
    assert all(len(prompts) == 5 for prompts in prompts_of.values())


@pytest.mark.parametrize(
    ("words", "places"),
    [((), ("cached", "live")), pytest.param(LORA, ("adapter", "cached"), marks=pytest.mark.slow)],
    ids=["all weights", "lora"],
)
def test_it_is_the_same_whatever_holds_the_reference(
    words: tuple[str, ...], places: tuple[str, str], tmp_path: Path
) -> None:
    found = []
    for place in places:
        options = (*words, f"model.reference={place}", f"cache_dir={tmp_path}/{place}/cache")
        run(tmp_path / place, *POINT, *FAST, "trainer.max_steps=3", *options)
        found.append(column(tmp_path / place, "train/z0"))
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-6)
    assert found[0][3] > 1e-4


def of_ranks(folder: Path, strategy: str) -> dict[str, Any]:
    words = ("trainer.devices=2", "data.batch_size=2", f"strategy={strategy}", "trainer.max_steps=5")
    return train_as_rank(folder / strategy, *POINT, *FAST, *words)


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_two_ranks_equal_one_device(strategy: str, tmp_path: Path) -> None:
    expected = run(tmp_path / "one", *POINT, *FAST, "trainer.max_steps=5")
    for found in run_ranks(partial(of_ranks, tmp_path, strategy)):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
    one, two = (column(tmp_path / name, "train/z0") for name in ("one", strategy))
    assert two == pytest.approx(one, rel=1e-3, abs=1e-6)
    assert one[5] > 1e-4


def test_a_stream_samples_the_prompts_of_its_validations(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(jsonl(*LABELS * 3))
    words = ("data=files", f"data.train={file}", "data.streaming=true", "data.max_length=64", "trainer.max_steps=3")
    run(tmp_path / "run", *POINT, *FAST, *words, "data.batch_size=2")
    assert column(tmp_path / "run", "train/z0")[3] > 1e-4


def test_the_loss_of_bco_takes_it_too(tmp_path: Path) -> None:
    run(tmp_path, *POINT, *FAST, "loss=bco", "trainer.max_steps=3")
    assert column(tmp_path, "train/z0")[3] > 1e-4
    assert column(tmp_path, "train/delta") == {}


def test_the_run_says_what_it_costs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(tmp_path, *POINT, "trainer.max_steps=1")
    assert "z₀ from replies to 5 prompts every 2 steps (about " in caplog.text


# What cannot work


def test_a_reference_that_does_not_fit_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halos.reporting.kl_reference, "_free_bytes", lambda device: 1000.0)
    expected = r"^model\.reference=cached: expected .* MiB for the reference.*; train LoRA adapters \(model\.lora\.enab"
    with pytest.raises(ValueError, match=expected):
        run(tmp_path, *POINT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sampling.kl_prompts=0",), r"sampling\.kl_prompts: expected 1 or more for a loss that samples the policy"),
        (("model.random_weights=true",), r"model\.random_weights: expected false for a loss that samples the policy"),
    ],
)
def test_runs_without_samples_or_a_reference_are_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        run(tmp_path, *POINT, *words)


# Plain Lightning


def plain_fit(folder: Path, *callbacks: pl.Callback) -> halos.KTO:
    file = folder / "labels.jsonl"
    file.write_text(jsonl(*LABELS))
    backbone = halos.Backbone.from_pretrained("pkg://halos.toy/reference", reference="live")
    loss = halos.KTO(backbone, reference_point="policy", reference_point_steps=1, optim=halos.AdamW(lr=1e-2))
    data = halos.PreferenceDataModule(file, batch_size=1, max_length=64, cache_dir=None)
    quiet: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
    }
    trainer = pl.Trainer(**quiet, max_epochs=2, enable_checkpointing=False, callbacks=list(callbacks))
    trainer.fit(loss, datamodule=data)
    return loss


def test_a_plain_trainer_takes_the_callback(tmp_path: Path) -> None:
    loss: Any = plain_fit(tmp_path, PolicyPoint(prompts=4, max_new_tokens=12))
    assert float(loss.reference_point.kl) > 1e-4


def test_a_plain_trainer_without_it_is_refused(tmp_path: Path) -> None:
    message = r"^loss\.reference_point=policy: expected a callback .* found none; add halos\.training\.PolicyPoint\(\)"
    with pytest.raises(ValueError, match=message):
        plain_fit(tmp_path)
