"""Plain Lightning use, as the documentation shows it: a Trainer, an objective, a data module."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import halos
from halos.data.batches.batch import Batch
from halos.data.preparation.needs import DataNeeds
from halos.policy.logprobs.completions import LogProbs

TOY = "pkg://halos.toy/reference"
BUILT_IN = [name for name in dir(halos.objectives) if isinstance(getattr(halos.objectives, name), type)]
LOSSES = [
    name
    for name in BUILT_IN
    if issubclass(getattr(halos.objectives, name), halos.Objective) and name not in ("Objective", "Mix")
]


class Hinge(halos.Objective):
    """A loss of a user's own."""

    view = "pairs"

    def compute(self, batch: Batch, policy: LogProbs, reference: LogProbs) -> halos.Output:
        rewards = policy.sum - reference.sum
        losses = softplus(1 - (rewards[:, 0] - rewards[:, 1]))
        return halos.Output(loss={"hinge": self.per_example(losses, batch)}, rewards=rewards)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pairs with scores, from which every view can be derived."""
    rng, file = random.Random(0), tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    # Words of the toy model.
    things = "watch lamp radio desk chair tent kettle jacket phone camera card coupon parcel invoice manual guide price"
    things += " voucher receipt login"
    rows = [
        {
            "prompt": f"broken {thing}",
            "chosen": "thanks for writing . we check . " + "please " * rng.randint(0, 4),
            "rejected": "no . " + "go away " * rng.randint(1, 3),
            "score_chosen": 1.0,
            "score_rejected": -1.0,
        }
        for thing in things.split()
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def data_of(pairs: Path, **options: Any) -> halos.PreferenceDataModule:
    return halos.PreferenceDataModule(pairs, **{"batch_size": 4, "max_length": 64, **options})


def trainer_of(folder: Path, **options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return pl.Trainer(**{**quiet, "max_epochs": 1, "default_root_dir": folder, **options})


def weights(loss: halos.Objective) -> dict[str, Tensor]:
    assert loss.backbone is not None
    return {name: value.clone() for name, value in loss.backbone.policy.state_dict().items()}


def make(name: str, **options: Any) -> halos.Objective:
    kind = Hinge if name == "Hinge" else getattr(halos.objectives, name)
    return kind(halos.Backbone.from_pretrained(TOY), optim=halos.AdamW(lr=1e-3), **options)


QUICK = ("KTO", "CSFT", "PPO", "BradleyTerry", "Hinge")
"""Of the losses, one for every kind of need: y', control tokens, hidden states, a reward head, a loss of one's own."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in (*LOSSES, "Hinge")]
)
def test_each_loss_trains_validates_and_saves(name: str, pairs: Path, tmp_path: Path) -> None:
    loss, data = make(name), data_of(pairs, val_size=4)
    before = weights_of_start()
    trainer = trainer_of(tmp_path, max_steps=2, val_check_interval=2, enable_checkpointing=False)
    trainer.fit(loss, datamodule=data)
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    assert any(not torch.equal(value, before[key]) for key, value in weights(loss).items() if key in before)
    assert (data.reference is not None) == loss.needs.reference
    loss.trained.save_pretrained(tmp_path / "aligned")
    files = {path.name for path in (tmp_path / "aligned").iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= files


def test_a_reward_model_is_saved_with_its_head(pairs: Path, tmp_path: Path) -> None:
    loss = make("BradleyTerry")
    trainer_of(tmp_path, max_steps=2, enable_checkpointing=False).fit(loss, datamodule=data_of(pairs))
    loss.trained.save_pretrained(tmp_path / "rewards")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rewards")
    assert loss.reward_head.linear.weight.any()
    assert torch.equal(saved.score.weight, loss.reward_head.linear.weight)


def weights_of_start() -> dict[str, Tensor]:
    policy = halos.Backbone.from_pretrained(TOY).policy
    return {name: value.clone() for name, value in policy.state_dict().items()}


def test_the_saved_model_is_the_trained_one(pairs: Path, tmp_path: Path) -> None:
    loss = make("KTO", beta=0.1)
    trainer_of(tmp_path, max_steps=2, enable_checkpointing=False).fit(loss, datamodule=data_of(pairs))
    assert loss.backbone is not None
    loss.backbone.save_pretrained(tmp_path / "aligned")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in weights(loss).items())
    assert AutoTokenizer.from_pretrained(tmp_path / "aligned").chat_template == loss.backbone.tokenizer.chat_template


def test_a_warning_about_the_data_comes_once(pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = halos.Backbone.from_pretrained(TOY)
    backbone.policy.config.rope_parameters = {"rope_type": "dynamic"}
    loss, data = halos.SFT(backbone), data_of(pairs, val_size=4, max_length=256)
    trainer = trainer_of(tmp_path, max_steps=1, enable_checkpointing=False)
    trainer.validate(loss, datamodule=data, verbose=False)
    trainer.fit(loss, datamodule=data)
    assert caplog.text.count("rope_type=dynamic") == 1


@pytest.mark.parametrize("epochs", [1, 3])
def test_an_epoch_is_a_pass(epochs: int, pairs: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    class Seen(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, index: int) -> None:
            seen.extend(batch.ids)

    validated: list[int] = []

    class Validated(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
            validated.append(trainer.global_step)

    trainer = trainer_of(
        tmp_path,
        max_epochs=epochs,
        callbacks=[Seen(), Validated()],
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(make("DPO"), datamodule=data_of(pairs, val_size=4))
    assert trainer.global_step == 4 * epochs
    assert trainer.current_epoch == epochs
    assert validated == [4 * (epoch + 1) for epoch in range(epochs)]
    for epoch in range(epochs):  # 16 training pairs, each once in every pass
        assert len(set(seen[16 * epoch : 16 * (epoch + 1)])) == 16


def test_a_plain_run_is_the_run_of_the_command(pairs: Path, tmp_path: Path) -> None:
    settings = {"data.batch_size": 4, "data.max_length": 64, "data.val_size": 4, "trainer.enable_progress_bar": False}
    optim = {"optim.lr": 1e-3, "optim.warmup": 0.1, "trainer.gradient_clip_val": 1.0, "sampling.prompts": 0}
    halos.train(
        loss="dpo",
        model=TOY,
        data=pairs,
        output_dir=tmp_path / "run",
        overrides={**settings, **optim, "logger": "none"},
    )
    loss = halos.DPO(halos.Backbone.from_pretrained(TOY), optim=halos.AdamW(lr=1e-3))
    trainer = trainer_of(tmp_path, gradient_clip_val=1.0, enable_checkpointing=False)
    trainer.fit(loss, datamodule=data_of(pairs, val_size=4))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in weights(loss).items())


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_resumed_fit_is_the_uninterrupted_one(stop: int, pairs: Path, tmp_path: Path) -> None:
    """Stopped in the first epoch, at its end and in the second: to the bit."""

    def fit(**options: Any) -> tuple[dict[str, Tensor], pl.Trainer]:
        checkpoint = options.pop("ckpt_path", None)
        loss = make("KTO")
        trainer = trainer_of(tmp_path, **{"max_epochs": 3, **options})
        trainer.fit(loss, datamodule=data_of(pairs, batch_size=20), ckpt_path=checkpoint, weights_only=True)
        return weights(loss), trainer

    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, _ = fit(callbacks=[saver])
    again, trainer = fit(ckpt_path=tmp_path / "saved" / f"step={stop}.ckpt", enable_checkpointing=False)
    assert trainer.global_step == 6
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_data_module_serves_one_loss_after_another(pairs: Path, tmp_path: Path) -> None:
    data, losses = data_of(pairs), []
    for name in ("KTO", "DPO", "SFT", "KTO"):
        loss = make(name)
        trainer_of(tmp_path, max_steps=2, enable_checkpointing=False).fit(loss, datamodule=data)
        losses.append(weights(loss))
    assert all(torch.equal(losses[3][name], value) for name, value in losses[0].items())


def test_a_second_fit_keeps_the_first_reference(pairs: Path, tmp_path: Path) -> None:
    loss = make("DPO")
    trainer_of(tmp_path, max_steps=2, enable_checkpointing=False).fit(loss, datamodule=data_of(pairs))
    data = data_of(pairs)
    trainer_of(tmp_path, max_steps=1, enable_checkpointing=False).fit(loss, datamodule=data)
    fresh = data_of(pairs)
    trainer_of(tmp_path, max_steps=1, enable_checkpointing=False).fit(make("DPO"), datamodule=fresh)
    assert data.reference is not None
    assert fresh.reference is not None
    for key, values in fresh.reference.entries.items():
        assert torch.equal(data.reference.entries[key], values)


# What cannot work


def test_data_prepared_for_another_view_are_refused(pairs: Path, tmp_path: Path) -> None:
    data = data_of(pairs)
    data.prepare(DataNeeds(view="pairs"), halos.Backbone.from_pretrained(TOY).tokenizer)
    with pytest.raises(ValueError, match=r"expected data prepared for SFT \(view 'demonstrations'\), found .* 'pairs'"):
        trainer_of(tmp_path).fit(make("SFT"), datamodule=data)


@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"max_steps": 0}, {"max_epochs": 0}])
def test_a_fit_that_trains_nothing_is_an_error(options: dict[str, int], pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one step"):
        trainer_of(tmp_path, **options).fit(make("DPO"), datamodule=data_of(pairs))


def test_a_loader_without_batches_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one training step, found none"):
        trainer_of(tmp_path).fit(make("SFT"), train_dataloaders=[])


def test_an_objective_of_another_kind_is_refused(pairs: Path, tmp_path: Path) -> None:
    class Other(pl.LightningModule):
        def training_step(self, batch: Batch) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(ValueError, match=r"expected an objective of halos .* found Other"):
        trainer_of(tmp_path).fit(Other(), datamodule=data_of(pairs))


def test_a_backbone_without_a_tokenizer_is_refused(pairs: Path, tmp_path: Path) -> None:
    backbone = halos.Backbone(halos.Backbone.from_pretrained(TOY).policy, with_reference=True)
    with pytest.raises(ValueError, match=r"expected a backbone with a tokenizer: use Backbone\.from_pretrained"):
        trainer_of(tmp_path).fit(halos.DPO(backbone), datamodule=data_of(pairs))


def test_an_objective_without_a_backbone_is_refused(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="KTO: expected a backbone to train, found none"):
        trainer_of(tmp_path).fit(halos.KTO(beta=0.1), datamodule=data_of(pairs))


# Two processes

SCRIPT = """
import sys
import lightning.pytorch as pl
import halos

pairs, folder, strategy, devices, batch_size = sys.argv[1:]
data = halos.PreferenceDataModule(pairs, batch_size=int(batch_size), max_length=64, val_size=4)
loss = halos.{loss}(halos.Backbone.from_pretrained("pkg://halos.toy/reference"), optim=halos.AdamW(lr=1e-3))
trainer = pl.Trainer(
    max_epochs=1, accelerator="cpu", strategy=strategy, devices=int(devices), logger=False, enable_progress_bar=False,
    enable_model_summary=False, default_root_dir=folder,
)
trainer.fit(loss, datamodule=data)
assert trainer.global_step == len(data.rows["train"]) // 8, trainer.global_step
if trainer.is_global_zero:
    with open(f"{{folder}}/loss.txt", "w") as file:
        file.write(str(float(trainer.callback_metrics["val/loss"])))
loss.backbone.save_pretrained(f"{{folder}}/aligned")
"""


def run_script(tmp_path: Path, pairs: Path, *words: str, loss: str = "KTO") -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(loss=loss))
    environment = {**os.environ, "PYTHONPATH": str(Path(halos.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in environment.items() if key not in ("LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable, str(script), str(pairs), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.ranks
@pytest.mark.long
@pytest.mark.parametrize("loss", ["KTO", *(pytest.param(n, marks=pytest.mark.slow) for n in LOSSES if n != "KTO")])
def test_two_processes_of_a_script_train_as_one(loss: str, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = run_script(tmp_path, pairs, str(tmp_path / "one"), "auto", "1", "8", loss=loss)
    two = run_script(tmp_path, pairs, str(tmp_path / "two"), "ddp", "2", "4", loss=loss)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr[-2000:] + two.stderr[-2000:]
    kind = AutoModelForSequenceClassification if loss == "BradleyTerry" else AutoModelForCausalLM
    models = [kind.from_pretrained(tmp_path / name / "aligned") for name in ("one", "two")]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        # AdamW turns rounding of a gradient near 0 into a step of the learning rate, for single weights.
        assert (ours - theirs).abs().mean() < 1e-5
    losses = [float((tmp_path / name / "loss.txt").read_text()) for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_forked_processes_are_refused(pairs: Path, tmp_path: Path) -> None:
    run = run_script(tmp_path, pairs, str(tmp_path), "ddp_fork", "2", "8")
    assert run.returncode != 0
    assert "strategy: expected one whose processes run the whole script (ddp)" in run.stderr
    assert not (tmp_path / "aligned").exists()
