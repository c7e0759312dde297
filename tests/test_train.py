"""Whole runs on the toy world: what they leave behind, how they resume, and what they refuse."""

import csv
import gzip
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pyarrow as pa
import pytest
import torch
from hydra.utils import get_class
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from pyarrow import parquet
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import halos.commands.train
from halos.commands.train import train
from halos.policy.loading import ModelSpec
from halos.policy.reference import precompute
from halos.processes.errors import RunFailed
from halos.toy.feedback import toy_feedback
from halos.toy.model import ASSISTANT, BAD, END, GOOD
from halos.training.run_folder import CONTENTS
from halos.training.trainer import warn_if_emulated
from tests.commands.test_inspect_data import ROWS
from tests.fork import run_ranks
from tests.test_config import compose, options

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
    "sampling.size=0",
    "logger=none",
)
"""12 prompts with two completions each: a pass of 6 steps, or of 3 over pairs."""

SPEED = ("train/examples_per_second", "train/tokens_per_second")


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    files = any(word.startswith("data=") for word in overrides)
    quick = [word for word in QUICK if not (files and word.startswith("data.source."))]
    return train(compose(*quick, f"output_dir={folder}", *overrides))


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


# What a run leaves behind

AT_STEP_0 = {
    "kto": 0.5,
    "kto_zero": 0.5,
    "bco": math.log(2),
    "dpo": math.log(2),
    "cdpo": math.log(2),
    "robust_dpo": math.log(2),
    "ipo": 25.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
}
SUMMARY = [
    "loss",
    "strategy",
    "precision",
    "world_size",
    "steps",
    "examples",
    "tokens",
    "train_seconds",
    "reference_seconds",
    "peak_rss_mb",
    "peak_gpu_mb",
    "train_loss",
    "metrics",
    "samples",
]
NAMES = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/auc",
    "logps/chosen",
    "logps/rejected",
    "kl",
    "kl/raw",
    "kl/policy_reference",
    "loss/policy",
    "loss/critic",
    "loss/kl",
}
OWN_NAMES = {
    "bco": {"delta"},
    "cpo": {"loss/prefer", "loss/sft"},
    "grpo": {"groups/incomplete"},
    "kto_reference_free": {"logps/mismatched"},
    "mix": {"loss/dpo", "loss/sft"},
    "orpo": {"loss/odds", "loss/sft"},
    "slic": {"loss/calibration", "loss/sft"},
}
TRAIN_NAMES = NAMES | {"examples_per_second", "tokens_per_second", "grad_norm", "lr"}
LOSSES = [option for option in options("loss") if option != "bradley_terry"]
WITHOUT_REFERENCE = {"cpo", "csft", "kto_reference_free", "orpo", "sft", "simpo", "slic"}
WITHOUT_REWARDS = {"csft", "sft"}
STEPS = 3


def is_paired(loss: str) -> bool:
    node = compose(f"loss={loss}").loss
    return loss == "mix" or get_class(node._target_).view == "pairs"


@pytest.fixture(scope="module", params=LOSSES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict]:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    chosen = [f"loss={request.param}", f"data.source.feedback={'pairs' if is_paired(request.param) else 'labels'}"]
    sampling = ["sampling.prompts=2", "sampling.size=8", "logger=tensorboard"]
    return (
        request.param,
        folder,
        run(folder, *chosen, *sampling, f"trainer.max_steps={STEPS}", "trainer.val_check_interval=1"),
    )


def test_a_run_leaves_exactly_the_promised_files(trained: tuple[str, Path, dict]) -> None:
    _, folder, _ = trained
    assert {file.name for file in folder.iterdir()} == set(CONTENTS) - {"evaluation"}
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == STEPS
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))


def test_the_summary_is_what_train_returns_with_exactly_the_promised_keys(trained: tuple[str, Path, dict]) -> None:
    loss, folder, summary = trained
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert list(summary) == SUMMARY
    assert {"reference_desirable", "policy_desirable", "kl"} <= set(summary["samples"])
    assert (summary["loss"], summary["strategy"], summary["precision"]) == (loss, "auto", "32-true")
    assert (summary["world_size"], summary["steps"], summary["examples"]) == (1, STEPS, STEPS * 4)
    assert len(summary["train_loss"]) == STEPS
    assert summary["tokens"] > summary["examples"]
    assert summary["train_seconds"] > 0
    assert (summary["reference_seconds"] > 0) == (loss not in WITHOUT_REFERENCE)


def test_the_configuration_is_kept_resolved(trained: tuple[str, Path, dict]) -> None:
    loss, folder, _ = trained
    kept = OmegaConf.load(folder / "config.yaml")
    assert kept.loss.name == loss
    assert kept.output_dir == str(folder)
    assert "${" not in (folder / "config.yaml").read_text()


def test_metrics_csv_has_each_step_once_under_known_names(trained: tuple[str, Path, dict]) -> None:
    loss, folder, summary = trained
    with (folder / "metrics.csv").open() as stream:
        names = set(next(csv.reader(stream)))
    of_both = NAMES | OWN_NAMES.get(loss, set())
    allowed = {f"train/{name}" for name in TRAIN_NAMES | of_both} | {f"val/{name}" for name in of_both}
    assert names <= {"step", *allowed}
    assert {"train/loss", "train/lr", "train/grad_norm", *SPEED, "val/loss", "train/logps/chosen"} <= names
    rows = [row["step"] for row in table(folder) if row["train/loss"]]
    assert rows == [str(step) for step in range(1, STEPS + 1)]
    assert list(column(folder, "train/loss").values()) == pytest.approx(summary["train_loss"], rel=1e-6)
    assert list(column(folder, "val/loss")) == list(range(STEPS + 1))


def test_a_step_without_undesirable_completions_has_no_metrics_of_them(tmp_path: Path) -> None:
    run(tmp_path, "data.batch_size=1", "trainer.max_steps=8")
    rows = [row for row in table(tmp_path) if row["train/loss"]]
    assert len(rows) == 8
    sides = [(bool(row["train/rewards/chosen"]), bool(row["train/rewards/rejected"])) for row in rows]
    assert set(sides) == {(True, False), (False, True)}
    assert "train/rewards/margins" not in rows[0]


def test_the_summary_has_the_metrics_of_the_last_validation(trained: tuple[str, Path, dict]) -> None:
    _, folder, summary = trained
    last = next(row for row in reversed(table(folder)) if row["val/loss"])
    assert last["step"] == str(STEPS)
    assert summary["metrics"] == {k.removeprefix("val/"): float(v) for k, v in last.items() if v and "val/" in k}


def test_before_the_first_step_the_policy_is_the_reference(trained: tuple[str, Path, dict]) -> None:
    loss, folder, _ = trained
    first = {name: float(value) for name, value in table(folder)[0].items() if value}
    assert first.pop("step") == 0
    assert ("val/rewards/margins" in first) == (loss not in WITHOUT_REWARDS)
    if loss in AT_STEP_0:
        assert first["val/loss"] == pytest.approx(AT_STEP_0[loss], abs=1e-6)
    if loss in WITHOUT_REFERENCE:
        return
    expected = {"rewards/accuracies": 0.5, "rewards/auc": 0.5}
    for name, value in first.items():
        if "rewards/" in name or "kl" in name.split("/"):
            assert value == pytest.approx(expected.get(name.removeprefix("val/"), 0.0), abs=1e-5), name


@pytest.mark.parametrize(("loss", "feedback"), [("kto", "labels"), ("dpo", "pairs"), ("ppo", "labels")])
def test_before_the_first_step_a_live_reference_agrees_to_the_bit(loss: str, feedback: str, tmp_path: Path) -> None:
    run(tmp_path, f"loss={loss}", f"data.source.feedback={feedback}", "model.reference=live", "trainer.max_steps=1")
    first = {name: float(value) for name, value in table(tmp_path)[0].items() if value}
    expected = {"rewards/accuracies": 0.5, "rewards/auc": 0.5}
    for name, value in first.items():
        if "rewards/" in name or "kl" in name.split("/"):
            assert value == expected.get(name.removeprefix("val/"), 0.0), name


def test_a_reference_that_is_cached_is_neither_computed_nor_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = f"cache_dir={tmp_path}/cache"
    options = ("data.source.feedback=pairs", "sampling.size=0", cache)
    batches: list[int] = []
    objectives: list[Any] = []
    score, fit = precompute._score, halos.commands.train.fit

    def counting(backbone: Any, work: Any, batch: Any) -> Any:
        batches.append(len(batch))
        return score(backbone, work, batch)

    def keeping(run: halos.commands.train.Run, trainer: pl.Trainer) -> None:
        fit(run, trainer)
        objectives.append(run.objective)

    monkeypatch.setattr(precompute, "_score", counting)
    monkeypatch.setattr(halos.commands.train, "fit", keeping)
    first = run(tmp_path / "first", "loss=dpo", *options)
    assert batches
    assert first["reference_seconds"] > 0
    batches.clear()
    # Another run of it reads what the first has left; KTO adds the mismatched completions only.
    again = run(tmp_path / "again", "loss=dpo", *options)
    assert not batches
    assert again["train_loss"] == first["train_loss"]
    assert_same_weights(tmp_path / "first", tmp_path / "again")
    computed = first["examples"] * 2 + 8
    run(tmp_path / "kto", "loss=kto", *options)
    assert 0 < sum(batches) <= computed
    for objective in objectives:
        assert objective.trained.reference is None


def test_a_damaged_cache_changes_nothing(tmp_path: Path) -> None:
    options = ("trainer.max_steps=2", "sampling.size=0", f"cache_dir={tmp_path}/cache")
    first = run(tmp_path / "first", *options)
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    assert run(tmp_path / "second", *options)["train_loss"] == first["train_loss"]


def chosen_logprob(folder: Path, loss: str) -> float:
    """The mean log-prob of what people liked in the validation data, by plain transformers and one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    found = []
    for record in toy_feedback(size=4, feedback="pairs" if is_paired(loss) else "labels", split="val"):
        liked = [record.completions[better].text for better, _ in record.preferences]
        liked += [completion.text for completion in record.completions if completion.desirable]
        for text in liked:
            turns = [{"role": "user", "content": record.prompt}]
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            ids = torch.tensor([prompt + tokenizer(text + END, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scored = logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            found.append(float(scored.sum()))
    return sum(found) / len(found)


def test_plain_transformers_load_the_trained_policy(trained: tuple[str, Path, dict]) -> None:
    loss, folder, summary = trained
    assert chosen_logprob(folder, loss) == pytest.approx(summary["metrics"]["logps/chosen"], rel=1e-5)
    assert summary["metrics"]["logps/chosen"] != pytest.approx(column(folder, "val/logps/chosen")[0], rel=1e-4)


def test_the_exported_template_conditions_on_the_desirable_token_once(trained: tuple[str, Path, dict]) -> None:
    loss, folder, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    turns = [{"role": "user", "content": "i bought a lamp."}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text.endswith(ASSISTANT + GOOD if loss == "csft" else ASSISTANT)
    assert (text.count(GOOD), text.count(BAD)) == (int(loss == "csft"), 0)
    assert GOOD not in tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_conditioned_model_trained_on_is_conditioned_once(tmp_path: Path) -> None:
    first = tmp_path / "first"
    run(first, "loss=csft", "trainer.max_steps=1")
    cfg = compose(*QUICK, "loss=csft", f"model.path={first / 'model'}", f"output_dir={tmp_path / 'second'}")
    prepared = halos.commands.train.prepare(cfg)
    controls = prepared.tokens.tokenizer.convert_tokens_to_ids([GOOD, BAD])
    for row in prepared.data.rows["train"].rows:
        assert [token for token in row.prompt if token in controls] == [controls[0 if row.desirable else 1]]


def test_control_tokens_that_are_new_to_the_vocabulary_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    compare = halos.commands.train.compare
    monkeypatch.setattr(halos.commands.train, "compare", lambda *a, **k: (compared.extend(a[:2]), compare(*a, **k))[1])
    tokens = ("loss.desirable_token='<yes>'", "loss.undesirable_token='<no>'")
    run(tmp_path, "loss=csft", *tokens, "trainer.max_steps=1", "sampling.size=4")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert max(tokenizer.convert_tokens_to_ids(["<yes>", "<no>"])) == len(tokenizer) - 1
    # The policy can say them, so the model that it is compared with has to know them too.
    assert [made.get_input_embeddings().weight.shape[0] for made in (model, *compared)] == [len(tokenizer)] * 3


def test_a_reward_model_is_exported_as_a_classifier_with_its_scores(tmp_path: Path) -> None:
    words = ["loss=bradley_terry", "data.source.feedback=pairs", "sampling.size=8", "sampling.prompts=2"]
    summary = run(tmp_path, *words, "trainer.val_check_interval=1")
    assert column(tmp_path, "val/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert "samples" not in summary
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    scores: dict[bool, list[float]] = {True: [], False: []}
    for record in toy_feedback(size=4, feedback="pairs", split="val"):
        turns = [{"role": "user", "content": record.prompt}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        for pair in record.preferences:
            for chosen, index in zip((True, False), pair, strict=True):
                text = prompt + record.completions[index].text + END
                inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
                scores[chosen].append(float(model(input_ids=inputs["input_ids"]).logits[0, 0].detach()))
    for name, values in (("chosen", scores[True]), ("rejected", scores[False])):
        assert sum(values) / len(values) == pytest.approx(summary["metrics"][f"rewards/{name}"], rel=1e-4)
    assert abs(summary["metrics"]["rewards/margins"]) > 1e-3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sweep_metric=samples/kll",), "sweep_metric: expected val/… or one of samples/kl, .*; found 'samples/kll'"),
        (
            ("sweep_metric=samples/kl",),
            "sweep_metric: expected a run with samples .* for samples/kl, found one",
        ),
        (("sweep_metric=val/loss", "sweep_max_kl=2"), "sweep_max_kl: expected a run with samples .* for samples/kl"),
        (("sweep_metric=val/los",), "sweep_metric: expected one of .*val/loss, .*; found 'val/los'"),
        (("sweep_metric=val/los", "rounds.count=2", "rounds.round=1"), "a step"),
        (("sweep_metric=val/los", "rounds.count=2", "rounds.round=2"), "sweep_metric: expected one of .*val/loss"),
    ],
)
def test_what_a_sweep_cannot_be_told_is_found_before_the_first_step(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: object, **__: object) -> None:
        raise ValueError("a step")

    monkeypatch.setattr(pl.Trainer, "fit", fit)
    with pytest.raises(ValueError, match=said):
        run(tmp_path, *words)


def test_reference_free_kto_loads_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("halos.policy.backbone.frozen_copy", lambda policy: made.append(policy) or policy)
    run(tmp_path / "free", "loss=kto_reference_free", "model.reference=live", "trainer.max_steps=1")
    assert not made
    run(tmp_path / "kto", "loss=kto", "model.reference=live", "trainer.max_steps=1")
    assert made


def test_humanline_changes_the_loss_once_the_policy_has_moved(tmp_path: Path) -> None:
    words = ["trainer.max_steps=2", "optim.warmup=0"]
    plain = run(tmp_path / "plain", *words)
    narrow = ["humanline.enabled=true", "humanline.log_epsilon_P=-0.001", "humanline.log_epsilon_R=0.001"]
    clamped = run(tmp_path / "clamped", *words, *narrow)
    assert clamped["train_loss"][0] == plain["train_loss"][0]
    assert clamped["train_loss"][1] != plain["train_loss"][1]


# Objectives from elsewhere

MINE = """
from halos.objectives import Needs, Objective, Output

class Mine(Objective):
    view = "pairs"
    needs = Needs(reference=False)

    def __init__(self, backbone, *, margin=1.0, **base):
        super().__init__(backbone, **base)
        self.margin = margin

    def compute(self, batch, policy, reference):
        chosen, rejected = policy.sum.unbind(1)
        return Output({"hinge": self.per_example((self.margin - chosen + rejected).relu(), batch)})

def not_a_class(): ...
"""


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "mymodule.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "mymodule"
    sys.modules.pop("mymodule", None)


def test_an_objective_from_outside_the_package_trains(my_module: str, tmp_path: Path) -> None:
    mine = ["loss=sft", f"loss._target_={my_module}.Mine", "loss.name=mine", "+loss.margin=2.0"]
    summary = run(tmp_path / "run", *mine, "data.source.feedback=pairs", "trainer.max_steps=2")
    assert summary["loss"] == "mine"
    assert len(summary["train_loss"]) == 2
    first = column(tmp_path / "run", "val/logps/chosen")[0] - column(tmp_path / "run", "val/logps/rejected")[0]
    assert column(tmp_path / "run", "val/loss")[0] >= 2 - first - 1e-6  # E max(0, u) ≥ E u


def test_the_target_of_a_loss_can_be_replaced_alone(my_module: str, tmp_path: Path) -> None:
    target = [f"loss._target_={my_module}.Mine", "~loss.beta", "~loss.label_smoothing"]
    summary = run(tmp_path / "run", "loss=dpo", *target, "data.source.feedback=pairs", "trainer.max_steps=1")
    assert len(summary["train_loss"]) == 1


# The same numbers, however a run is made


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
    callbacks = halos.commands.train._callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halos.commands.train, "_callbacks", lambda run: [*callbacks(run), StopAt(hook, step)])
        with pytest.raises(InterruptedError):
            run(folder, *overrides)
    assert not (folder / "summary.json").exists()


RESUMABLE = ("model.dropout=0.1", "checkpoint_every=2", "trainer.val_check_interval=0.5", "optim.lr=1e-2")
"""Dropout, so that a run resumes only if its randomness does; validation after 3 of 6 steps."""

LORA = ("model.lora.enabled=true", "model.reference=adapter", "optim.eps=1e-4")
"""With the toy world's eps of 1e-2 so few steps would hardly move an adapter."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, run(folder, *RESUMABLE)


def assert_same_run(one: tuple[Path, dict], other: tuple[Path, dict]) -> None:
    """Bitwise: losses, everything else that was logged, and weights."""
    (folder, summary), (other_folder, other_summary) = one, other
    for key in ("train_loss", "metrics", "steps", "examples", "tokens"):
        assert summary[key] == other_summary[key], key
    assert table(folder) == table(other_folder)
    assert_same_weights(folder, other_folder)


def test_the_same_seed_gives_the_same_run(uninterrupted: tuple[Path, dict], tmp_path: Path) -> None:
    assert_same_run((tmp_path, run(tmp_path, *RESUMABLE)), uninterrupted)


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 1),  # before there is a checkpoint
        ("on_train_batch_end", 3),  # between two checkpoints
        ("on_train_batch_start", 4),  # right behind a checkpoint
        ("on_validation_end", 3),
    ],
)
def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one(
    hook: str, step: int, uninterrupted: tuple[Path, dict], tmp_path: Path
) -> None:
    run_until(hook, step, tmp_path, *RESUMABLE)
    assert_same_run((tmp_path, run(tmp_path, *RESUMABLE, "resume=auto")), uninterrupted)


def test_a_run_stopped_between_a_checkpoint_and_its_validation_resumes(tmp_path: Path) -> None:
    options = (*RESUMABLE, "checkpoint_every=3")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(whole, *options)
    run_until("on_validation_start", 3, stopped, *options)
    summary = run(stopped, *options, "resume=auto")
    assert summary["train_loss"] == expected["train_loss"]
    assert_same_weights(whole, stopped)
    assert column(stopped, "train/loss") == column(whole, "train/loss")


@pytest.mark.parametrize(
    "words",
    [
        ("loss=bco",),  # its reward shift
        ("loss=grpo", "data.source.completions_per_prompt=4", "data.batch_size=8"),  # its groups
        ("reference_sync.every=3", "model.reference=live"),  # its reference: once before the stop, once behind it
        (*LORA, "model.lora.dropout=0.1"),
        (*LORA, "loss=ppo", "model.reference=cached"),  # a value head beside the adapters
    ],
    ids=["bco", "grpo", "reference_sync", "lora", "lora_ppo"],
)
def test_what_a_run_has_learnt_beside_its_weights_resumes(words: tuple[str, ...], tmp_path: Path) -> None:
    options = (*RESUMABLE, *words)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(whole, *options)
    run_until("on_train_batch_start", 4, stopped, *options)
    assert_same_run((stopped, run(stopped, *options, "resume=auto")), (whole, expected))


def test_a_moving_reference_is_another_run_and_compares_with_the_first_model(tmp_path: Path) -> None:
    words = ("trainer.max_steps=3", "sampling.size=16", "optim.lr=1e-2", "model.reference=live")
    plain = run(tmp_path / "plain", *words)
    synced = run(tmp_path / "synced", *words, "reference_sync.every=1", "reference_sync.alpha=1.0")
    assert synced["train_loss"][0] == plain["train_loss"][0]
    assert synced["train_loss"][1:] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert plain["train_loss"][2] != pytest.approx(0.5, abs=1e-4)
    assert synced["samples"]["reference_desirable"] == plain["samples"]["reference_desirable"]
    assert synced["samples"]["kl"] > 1e-3


def test_accumulated_steps_resume(tmp_path: Path) -> None:
    options = (*RESUMABLE, "trainer.accumulate_grad_batches=2", "trainer.max_epochs=2", "checkpoint_every=1")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(whole, *options)
    run_until("on_train_batch_start", 4, stopped, *options)
    assert_same_run((stopped, run(stopped, *options, "resume=auto")), (whole, expected))


class StopWithinStep(pl.Callback):
    """Asks the run to end from the third micro-batch on, as ``trainer.max_time`` does."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.should_stop or batch_idx >= 2


def test_steps_of_several_micro_batches_are_never_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = ("data.batch_size=1", "trainer.accumulate_grad_batches=4", "trainer.log_every_n_steps=10")
    whole = run(tmp_path / "whole", *options, "trainer.max_steps=5", "trainer.val_check_interval=0.3")
    assert whole["steps"] == 5
    assert list(column(tmp_path / "whole", "val/loss")) == [0, 1, 2, 3, 4, 5]
    callbacks = halos.commands.train._callbacks
    monkeypatch.setattr(halos.commands.train, "_callbacks", lambda run: [*callbacks(run), StopWithinStep()])
    options = (*options, "trainer.max_steps=5", "trainer.val_check_interval=0.3")
    stopped = run(tmp_path / "stopped", *options)
    assert stopped["train_loss"] == whole["train_loss"][:1]
    assert "stopped after 1 of 5 steps; resume=auto goes on" in caplog.text
    monkeypatch.undo()
    resumed = run(tmp_path / "stopped", *options, "resume=auto")
    assert resumed["train_loss"] == whole["train_loss"]
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")


class StopEachStep(pl.Callback):
    """Sends this process SIGTERM at the first micro-batch of a step."""

    def on_train_batch_start(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def run_step_by_step(folder: Path, *overrides: str) -> dict[str, Any]:
    """A run that a signal ends behind each of its steps, before the validation that may be due."""
    callbacks = halos.commands.train._callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halos.commands.train, "_callbacks", lambda run: [*callbacks(run), StopEachStep()])
        for step in range(1, 7):
            with pytest.raises(SystemExit) as end:
                run(folder, *overrides, "resume=auto")
            assert end.value.code == 143
            assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
        return run(folder, *overrides, "resume=auto")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("loss=ppo", "logger=tensorboard"),
        ("trainer.accumulate_grad_batches=2", "data.batch_size=2"),
    ],
    ids=["kto", "ppo", "accumulated"],
)
def test_a_run_interrupted_at_each_step_is_the_uninterrupted_one(words: tuple[str, ...], tmp_path: Path) -> None:
    options = (*RESUMABLE, *words)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(whole, *options)
    assert_same_run((stopped, run_step_by_step(stopped, *options)), (whole, expected))
    assert points(stopped) == points(whole)
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == {"last.ckpt", "step_5.ckpt", "step_6.ckpt"}


def points(folder: Path) -> list[tuple[str, int, float]]:
    """What TensorBoard has of a run, without what a clock said."""
    found = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}, purge_orphaned_data=False)
    if (folder / "tensorboard").exists():
        found.Reload()
    tags = [tag for tag in found.Tags()["scalars"] if tag not in SPEED] if (folder / "tensorboard").exists() else []
    return sorted((tag, event.step, event.value) for tag in tags for event in found.Scalars(tag))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("loss.beta=0.3",), r"loss\.beta: 0\.1 in the checkpoint, 0\.3 now"),
        (("seed=1", "data.source.seed=0"), r"seed: 0 in the checkpoint, 1 now"),
        (("loss=kto_zero",), r"loss\.name: kto in the checkpoint, kto_zero now"),
        (("data.source.noise=0.3",), r"data \(train\): \w+ in the checkpoint, \w+ now"),
        (("data.batch_size=8",), r"examples per step: 4 in the checkpoint, 8 now"),
        (
            ("data.batch_size=2", "trainer.accumulate_grad_batches=2"),
            r"\(micro-batches per step: 1 in the checkpoint, 2 now\)",
        ),
        (("data.keep_together=1",), r"\(data\.keep_together: 2 in the checkpoint, 1 now\)"),
        (("data.stratified=true",), r"\(data\.stratified: False in the checkpoint, True now\)"),
        (("model.random_weights=true",), r"model\.random_weights: False in the checkpoint, True now"),
    ],
)
def test_another_runs_checkpoint_is_refused_with_what_differs(
    words: tuple[str, ...], said: str, uninterrupted: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ModelSpec, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    checkpoint = uninterrupted[0] / "checkpoints" / "step_4.ckpt"
    with pytest.raises(ValueError, match=rf"resume: .*step_4\.ckpt belongs to another run .*{said}"):
        run(tmp_path, *RESUMABLE, *words, f"resume='{checkpoint}'")


def test_a_damaged_checkpoint_makes_way_for_the_one_before(
    uninterrupted: tuple[Path, dict], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_until("on_train_batch_start", 5, tmp_path, *RESUMABLE)
    last = tmp_path / "checkpoints" / "last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    assert_same_run((tmp_path, run(tmp_path, *RESUMABLE, "resume=auto")), uninterrupted)
    assert any("damaged" in message and "going on from" in message for message in caplog.messages)


def test_a_disk_that_is_full_ends_the_run_and_keeps_the_checkpoints_that_are_there(
    uninterrupted: tuple[Path, dict], tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    callbacks = halos.commands.train._callbacks

    class Fill(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # bytes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halos.commands.train, "_callbacks", lambda run: [*callbacks(run), Fill()])
        try:
            with pytest.raises(RunFailed, match=r"step_4\.ckpt: the checkpoint could not be written: File too large"):
                run(tmp_path, *RESUMABLE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "step_2.ckpt"}
    assert_same_run((tmp_path, run(tmp_path, *RESUMABLE, "resume=auto")), uninterrupted)


def test_a_checkpoints_path_resumes_into_another_folder(uninterrupted: tuple[Path, dict], tmp_path: Path) -> None:
    run_until("on_train_batch_start", 4, tmp_path / "old", *RESUMABLE)
    checkpoint = tmp_path / "old" / "checkpoints" / "step_4.ckpt"
    # Hydra wants quotes round a value with an equals sign.
    summary = run(tmp_path / "new", *RESUMABLE, f"resume='{checkpoint}'")
    assert summary["train_loss"] == uninterrupted[1]["train_loss"]
    assert_same_weights(tmp_path / "new", uninterrupted[0])
    assert list(column(tmp_path / "new", "train/loss")) == [5, 6]


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    summary = run(tmp_path, "trainer.max_steps=2")
    rows, before = table(tmp_path), {k: v.tolist() for k, v in weights(tmp_path).items()}
    again = run(tmp_path, "trainer.max_steps=2", "resume=auto")
    assert again["train_loss"] == summary["train_loss"]
    assert again["metrics"] == summary["metrics"]
    assert {k: v.tolist() for k, v in weights(tmp_path).items()} == before
    assert [row for row in table(tmp_path) if row["train/loss"]] == [row for row in rows if row["train/loss"]]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_finished_run_cannot_be_made_longer_or_shorter(steps: int, tmp_path: Path) -> None:
    run(tmp_path, "trainer.max_steps=2")
    config = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match=f"resume: .* after 2 of 2 steps, but {steps} are asked for .*max_steps"):
        run(tmp_path, f"trainer.max_steps={steps}", "resume=auto")
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2
    assert (tmp_path / "config.yaml").read_text() == config


def test_resume_auto_in_an_empty_folder_is_a_new_run(tmp_path: Path) -> None:
    assert len(run(tmp_path, "resume=auto", "trainer.max_steps=1")["train_loss"]) == 1


@pytest.mark.parametrize("loss", ["sft", "dpo", "grpo"])
def test_accumulation_equals_one_large_batch(loss: str, tmp_path: Path) -> None:
    options = (f"loss={loss}", f"data.source.feedback={'pairs' if loss == 'dpo' else 'labels'}")
    whole = run(tmp_path / "1", *options)
    parts = run(tmp_path / "2", *options, "data.batch_size=2", "trainer.accumulate_grad_batches=2")
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5, abs=1e-6)
    assert [parts[key] for key in ("steps", "examples", "tokens")] == [
        whole[key] for key in ("steps", "examples", "tokens")
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("plain"), "trainer.max_steps=3", "optim.lr=1e-2")


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


def test_gradients_are_clipped_and_logged_without_the_scale_of_16_mixed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("trainer.max_steps=3", "optim.lr=1e-2", "trainer.gradient_clip_val=0.1")
    expected = run(tmp_path / "32", *words)

    def scaled(*, precision: str, plugins: list[Any], **options: Any) -> pl.Trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        return pl.Trainer(plugins=[*plugins, MixedPrecision("16-mixed", "cpu", scaler)], **options)

    monkeypatch.setattr(halos.training.trainer, "check_precision", lambda *_, **__: None)  # the real one wants a GPU
    monkeypatch.setattr(halos.training.trainer, "pl", SimpleNamespace(Trainer=scaled))
    found = run(tmp_path / "16", *words, "precision=16-mixed")
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
    norms = [list(column(tmp_path / name, "train/grad_norm").values()) for name in ("16", "32")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    assert min(norms[1]) > 0.1


def test_random_weights_are_compared_only_where_they_are_kept(tmp_path: Path) -> None:
    words = ("model.random_weights=true", "trainer.max_steps=1", "optim.lr=0", "sampling.size=4")
    assert "samples" not in run(tmp_path / "gone", *words)
    kept = run(tmp_path / "kept", *words, "model.reference=live")
    assert kept["samples"]["kl"] == pytest.approx(0, abs=1e-5)


def test_max_epochs_counts_passes_over_the_data(tmp_path: Path) -> None:
    summary = run(tmp_path, "trainer.max_epochs=2", "data.batch_size=5")
    assert summary["steps"] == len(summary["train_loss"]) == math.ceil(2 * 24 / 5)
    assert list(column(tmp_path, "train/lr").values())[-1] > 0


@pytest.mark.parametrize(
    ("precision", "device", "capabilities", "warned"),
    [
        ("bf16-mixed", "cpu", {"architecture": "x86_64", "avx512_bf16": False}, True),
        ("bf16-true", "cpu", {"architecture": "x86_64"}, True),
        ("bf16-mixed", "cpu", {"architecture": "x86_64", "amx_bf16": True}, False),
        ("bf16-mixed", "cpu", {"architecture": "aarch64"}, False),
        ("bf16-mixed", "cpu", {}, False),
        ("bf16-mixed", "cuda", {"architecture": "x86_64"}, False),
        ("32-true", "cpu", {"architecture": "x86_64"}, False),
    ],
)
def test_emulated_bfloat16_is_warned_of(
    precision: str, device: str, capabilities: dict[str, Any], warned: bool, caplog: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    warn_if_emulated(precision, torch.device(device))
    assert bool(caplog.messages) is warned


@pytest.mark.parametrize(
    ("precision", "reference", "loss", "feedback", "first"),
    [
        ("bf16-mixed", "live", "kto", "labels", 0.5),
        ("bf16-mixed", "cached", "kto", "labels", 0.5),
        ("bf16-true", "live", "dpo", "pairs", math.log(2)),
    ],
)
def test_lower_precisions_start_at_the_reference_too(
    precision: str,
    reference: str,
    loss: str,
    feedback: str,
    first: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policies = []
    export = halos.commands.train.export_policy
    monkeypatch.setattr(
        halos.commands.train,
        "export_policy",
        lambda policy, *a, **k: [policies.append(policy), export(policy, *a, **k)],
    )
    options = [f"precision={precision}", f"model.reference={reference}", f"loss={loss}"]
    options += [f"data.source.feedback={feedback}", "trainer.max_steps=2", "sampling.size=4"]
    summary = run(tmp_path, *options)
    assert summary["precision"] == precision
    # Computed beforehand, in other packs, the reference's log-probs differ by bfloat16's rounding.
    assert column(tmp_path, "val/loss")[0] == pytest.approx(first, abs=1e-6 if reference == "live" else 1e-3)
    assert all(map(math.isfinite, summary["train_loss"]))
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {dtype}
    # What is not saved (rotary frequencies) has to be what the policy was trained with, too.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(buffer, loaded.get_buffer(name)) for name, buffer in policies[0].named_buffers())


def train_as_rank(folder: Path, *overrides: str) -> dict[str, Any]:
    # Lightning reads the rank when it is imported, which the server that forks the ranks has done before.
    rank_zero_only.rank = int(os.environ["LOCAL_RANK"])
    return run(folder, *overrides)


@pytest.mark.parametrize("words", [(), LORA], ids=["all weights", "lora"])
def test_two_processes_train_as_one_with_twice_the_batch(words: tuple[str, ...], tmp_path: Path) -> None:
    options = ("sampling.size=4", "sampling.prompts=1", *words)
    one = run(tmp_path / "one", *options)
    both = ("strategy=ddp", "trainer.devices=2", "data.batch_size=2", f"cache_dir={tmp_path}/cache")
    found = run_ranks(partial(train_as_rank, tmp_path / "two", *options, *both))
    for summary in found:
        assert summary["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert summary["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-4)
        assert [summary[key] for key in ("world_size", "examples", "tokens")] == [2, one["examples"], one["tokens"]]
    kept = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert kept["train_loss"] == found[0]["train_loss"]
    assert {file.name for file in (tmp_path / "two").iterdir()} == set(CONTENTS) - {"tensorboard", "evaluation"}
    assert list(column(tmp_path / "two", "train/loss")) == list(range(1, one["steps"] + 1))


# What is refused, before a model is loaded

GOOD_ROW = {"prompt": "i bought a lamp.", "completion": "happy to help.", "label": True}
BAD_ROW = {"prompt": "i bought a desk.", "completion": "go away.", "label": False}
LABELS = [GOOD_ROW, BAD_ROW]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelSpec, "load", lambda *_, **__: pytest.fail("a model was loaded"))


def jsonl(*rows: Any) -> str:
    return "".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("text", "loss", "said"),
    [
        ("", "kto", r"train\.jsonl: expected at least one row, found an empty file"),
        (jsonl(GOOD_ROW, "{oops"), "kto", r"train\.jsonl:2: expected JSON"),
        (jsonl(GOOD_ROW, "[1]"), "kto", r"train\.jsonl:2: expected an object"),
        (jsonl(GOOD_ROW, {"prompt": "a"}), "kto", r"train\.jsonl:2: expected 'prompt' with"),
        (jsonl(GOOD_ROW, {**BAD_ROW, "prompt": 3}), "kto", r"train\.jsonl:2: expected 'prompt' to be a text"),
        (jsonl(GOOD_ROW, {**BAD_ROW, "label": "meh"}), "kto", r"train\.jsonl:2: expected 'label' .* found 'meh'"),
        (
            jsonl(GOOD_ROW, {**BAD_ROW, "prompt": [{"role": "robot", "content": "a"}]}),
            "kto",
            r"train\.jsonl:2: .*one of system, user, assistant, tool; found 'robot'",
        ),
        (jsonl({**GOOD_ROW, "completion": " "}), "kto", r"train\.jsonl: .*every one was left out: empty completion"),
        (jsonl(GOOD_ROW, {**BAD_ROW, "label": True}), "dpo", r"no prompt has both .*2 unpaired desirable"),
        (jsonl({**BAD_ROW}), "sft", "nothing to imitate"),
        (jsonl(GOOD_ROW, {**GOOD_ROW, "completion": "all the best."}), "kto", "at least two different prompts"),
        (
            jsonl(GOOD_ROW, {**BAD_ROW, "prompt": "i bought a lamp. " * 20}),
            "kto",
            r"train\.jsonl:2.*data\.max_length = 64 .*found \d+; raise data\.max_length",
        ),
    ],
)
def test_bad_data_are_refused_with_their_place(text: str, loss: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "run", "data=json", f"data.train={file}", "data.max_length=64", f"loss={loss}")
    assert not (tmp_path / "run").exists()


def test_a_run_on_files_trains_and_validates(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(jsonl(*LABELS, {**GOOD_ROW, "prompt": "i bought a tent."}))
    held = tmp_path / "val.jsonl"
    held.write_text(jsonl(*({**row, "prompt": f"{row['prompt']} please help."} for row in LABELS)))
    words = ["data=json", f"data.train={file}", f"data.val={held}", "trainer.max_steps=2", "trainer.max_epochs=9"]
    summary = run(tmp_path / "run", *words)
    assert len(summary["train_loss"]) == 2
    assert column(tmp_path / "run", "val/loss")[0] == pytest.approx(0.5, abs=1e-6)
    assert list(summary) == [key for key in SUMMARY if key != "samples"]


def written(folder: Path, source: str) -> Path:
    """The rows of a public set's schema in a file, of another kind for each."""
    file = folder / {"hh": "a.jsonl.gz", "shp": "a.parquet", "oasst": "a.json", "json": "a.csv"}.get(source, "a.jsonl")
    rows, lines = ROWS[source], jsonl(*ROWS[source])
    if source == "shp":
        parquet.write_table(pa.Table.from_pylist(rows), file)
    elif source == "hh":
        file.write_bytes(gzip.compress(lines.encode()))
    elif source == "json":
        file.write_text("\n".join(",".join(cells) for cells in (rows[0], *(row.values() for row in rows))))
    else:
        file.write_text(json.dumps(rows) if source == "oasst" else lines)
    return file


@pytest.mark.parametrize("source", [*ROWS, "mix"])
def test_every_source_trains_from_files(source: str, tmp_path: Path) -> None:
    if source == "mix":
        parts = [f"{name}: {{data: {name}, train: {written(tmp_path, name)}}}" for name in ("hh", "json")]
        words = [f"data.mix={{{', '.join(parts)}}}"]
    else:
        words = [f"data.train={written(tmp_path, source)}"]
    common = ["loss=dpo", "trainer.max_steps=1", f"cache_dir={tmp_path / 'cache'}", "model.reference=live"]
    summary = run(tmp_path / "run", f"data={source}", *words, *common)
    assert summary["train_loss"] == [pytest.approx(math.log(2), abs=1e-6)]
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())["splits"]["train"]
    assert report["counts"]["examples"] == (2 if source == "mix" else 1)
    assert list((tmp_path / "cache" / "data").glob("*/*.arrow")), "records and token ids are kept"


def test_without_validation_data_there_are_no_validation_metrics(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(jsonl(*LABELS))
    summary = run(tmp_path / "run", "data=json", f"data.train={file}")
    assert summary["metrics"] == {}
    assert len(summary["train_loss"]) == summary["steps"] == 1


def model_folder(folder: Path) -> str:
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


def cut_gguf(folder: Path) -> str:
    file = folder / "cut.gguf"
    file.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 9)
    return str(file)


Words = Callable[[Path], list[str]]
REFUSED: dict[str, tuple[Words, str]] = {
    "no such file": (
        lambda tmp: ["data=json", f"data.train={tmp}/absent.jsonl"],
        r"absent\.jsonl: no such file",
    ),
    "no file given": (lambda tmp: ["data=json"], r"data=json needs data\.train=FILE"),
    "a bad number": (
        lambda tmp: ["data.batch_size=0"],
        r"data\.batch_size: expected a whole number from 1 on, found 0",
    ),
    "a bad knob of the toy world": (lambda tmp: ["data.source.noise=2"], "noise: expected a share from 0 to 1"),
    "a bad parameter of the loss": (lambda tmp: ["loss.beta=-1"], r"loss\.beta: expected a number .* found -1"),
    "an unknown kind of reference": (
        lambda tmp: ["model.reference=none"],
        r"model\.reference: expected auto, cached, live or adapter, found 'none'",
    ),
    "a head without rows": (
        lambda tmp: ["model.head_chunk=0"],
        r"model\.head_chunk: expected a whole number from 1 on or null, found 0",
    ),
    "an unknown statistic": (
        lambda tmp: ["model.statistics=[entropie]"],
        r"model\.statistics: expected a list of entropy, token_accuracy; found \['entropie'\]",
    ),
    "no folder": (lambda tmp: ["cache_dir=null"], r"cache_dir: expected a folder, found None"),
    "a validation behind the end": (
        lambda tmp: ["trainer.max_steps=3", "trainer.val_check_interval=4"],
        r"trainer\.val_check_interval: expected at most the 3 micro-batches of the run, .* found 4",
    ),
    "a validation within a step": (
        lambda tmp: ["trainer.accumulate_grad_batches=4", "trainer.val_check_interval=6"],
        r"trainer\.val_check_interval: .* a multiple of trainer\.accumulate_grad_batches=4, .* found 6",
    ),
    "more prompts than the world has": (
        lambda tmp: ["sampling.size=5000"],
        r"sampling\.size: expected .*5000",
    ),
    "a parameter that the loss lacks": (lambda tmp: ["+loss.gama=1"], r"halos\.objectives\.KTO .*'?gama'?"),
    "a parameter that the source lacks": (lambda tmp: ["+data.source.sise=1"], r"sise"),
    "a target that is no objective": (
        lambda tmp: ["loss._target_=collections.Counter"],
        r"loss\._target_: expected a subclass of halos\.objectives\.Objective, found collections\.Counter",
    ),
    "a target that is no class": (lambda tmp: ["loss._target_=mymodule.not_a_class"], r"loss\._target_: mymodule"),
    "a target that is not there": (lambda tmp: ["loss._target_=mymodule.Absent"], r"loss\._target_: mymodule\.Absent"),
    "a bad rate": (lambda tmp: ["optim.lr=-1"], r"optim\.lr: expected a number from 0 on, found -1"),
    "no model": (lambda tmp: ["model=hf"], r"model\.path: expected a hub id"),
    "a model folder without weights": (
        lambda tmp: ["model=hf", f"model.path={model_folder(tmp)}"],
        r"model\.path: expected weights \(model\.safetensors\) .*model\.random_weights=true",
    ),
    "a model folder that is not there": (lambda tmp: ["model=hf", f"model.path={tmp}/no"], r"model\.path: no such"),
    "a GGUF file that is cut off": (
        lambda tmp: ["model=hf", f"model.path={cut_gguf(tmp)}"],
        r"model\.path: .*cut\.gguf is cut off|install the extra with pip install 'halos\[gguf\]'",
    ),
    "a checkpoint that is not there": (lambda tmp: [f"resume={tmp}/no.ckpt"], r"resume: .*no\.ckpt, which does not"),
    "a folder for a checkpoint": (lambda tmp: [f"resume={tmp}"], r"resume: expected"),
    "no steps": (lambda tmp: ["trainer.max_steps=0"], r"trainer\.max_steps .*at least one step"),
}


@pytest.mark.usefixtures("no_model", "my_module")
@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_with_their_key(case: str, tmp_path: Path) -> None:
    words, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "run", *words(tmp_path))
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.desirable_weight=auto", "data.source.keep_undesirable=0"], "loss.desirable_weight=auto needs both"),
        (["loss=ppo", "trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches: PPO needs"),
        (["loss=sft", "humanline.enabled=true"], "humanline.enabled: expected a loss with a reference, found SFT"),
        (["humanline.enabled=true", "humanline.log_epsilon_P=1"], "humanline.log_epsilon_P: expected a number below"),
        (["loss=cpo", "reference_sync.every=2"], "reference_sync.every: expected a loss with a reference, found CPO"),
        (["reference_sync.every=2", "reference_sync.alpha=2"], "reference_sync.alpha: expected a share"),
        (["reference_sync.every=2"], "reference_sync.every: a reference that moves needs model.reference=live"),
        (["loss=mix", "~loss.weights.sft"], "loss.weights: expected one for each of loss.parts"),
        (["loss=mix", "loss.parts.sft._target_=halos.objectives.KTO"], "loss.parts: expected parts with one view"),
        (["optim=adamw_8bit"], r"optim: bitsandbytes(' optimizers need a CUDA device| is missing)"),
        (["trainer.devices=2"], "trainer.devices: strategy=auto uses one device, found 2"),
        (["trainer.max_steps=0"], "at least one step"),
    ],
)
def test_a_run_refused_before_training_leaves_its_folder_free(words: list[str], said: str, tmp_path: Path) -> None:
    for _ in range(2):  # the second time, a folder that is taken would be the complaint
        with pytest.raises(ValueError, match=said):
            run(tmp_path / "run", *words)


@pytest.mark.usefixtures("no_model")
def test_a_file_in_place_of_the_output_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir"):
        run(tmp_path / "file")


@pytest.mark.usefixtures("no_model")
def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=r"resume: .*last\.ckpt"):
        run(tmp_path, "resume=auto")


def test_a_folder_with_another_run_is_kept_unless_it_is_to_be_overwritten(tmp_path: Path) -> None:
    run(tmp_path, "trainer.max_steps=1")
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "summary.json").read_bytes()
    with pytest.raises(ValueError, match=r"output_dir: .* resume=auto .* overwrite=true"):
        run(tmp_path, "trainer.max_steps=1")
    with pytest.raises(ValueError, match="no such directory"):
        run(tmp_path, "overwrite=true", f"model.path={tmp_path}/no-model")
    assert (tmp_path / "summary.json").read_bytes() == before
    assert len(run(tmp_path, "overwrite=true", "trainer.max_steps=2")["train_loss"]) == 2
    assert list(column(tmp_path, "train/loss")) == [1, 2]
    assert (tmp_path / "notes.txt").read_text() == "mine"


# Losses that are not finite

POISONED = """
from halos.objectives import SFT

class Poisoned(SFT):
    def compute(self, batch, policy, reference):
        output = super().compute(batch, policy, reference)
        if self.training and self.trainer.global_step == 2:
            output.loss["sft"].total = output.loss["sft"].total * float("nan")
        return output
"""


@pytest.mark.parametrize("log_every", [1, 10])
def test_a_loss_that_is_not_a_number_stops_the_run_behind_its_last_checkpoint(
    log_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "poisoned.py").write_text(POISONED)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "run"
    words = (f"trainer.log_every_n_steps={log_every}", "checkpoint_every=1")
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 3; .*Examples of this step: toy/train:\d+#\d+"):
        run(folder, "loss=sft", "loss._target_=poisoned.Poisoned", *words)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values() if tensor.is_floating_point())
    assert not (folder / "summary.json").exists()
    assert list(column(folder, "train/loss")) == ([1, 2] if log_every == 1 else [])


class Trace(pl.Callback):
    """Weights and the optimizer's moments behind each step."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        moments = [v.tolist() for state in trainer.optimizers[0].state.values() for v in state.values()]
        self.seen.append([[p.tolist() for p in module.parameters()], moments])


def test_a_step_that_is_not_finite_is_skipped_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "poisoned.py").write_text(POISONED)
    monkeypatch.syspath_prepend(tmp_path)
    callbacks, trace = halos.commands.train._callbacks, Trace()
    monkeypatch.setattr(halos.commands.train, "_callbacks", lambda run: [*callbacks(run), trace])
    folder = tmp_path / "run"
    words = (
        "loss=sft",
        "loss._target_=poisoned.Poisoned",
        "non_finite=skip",
        "trainer.max_steps=5",
        "data.batch_size=2",
    )
    summary = run(folder, *words)
    assert [loss is None for loss in summary["train_loss"]] == [False, False, True, False, False]
    assert summary["skipped_steps"] == 1
    assert list(column(folder, "train/skipped_steps").values()) == [0, 0, 1, 1, 1]
    assert trace.seen[1] == trace.seen[2]
    assert trace.seen[2][0] != trace.seen[3][0]
    assert any("loss is nan at step 3" in told and "toy/train:" in told for told in caplog.messages)
    assert json.loads((folder / "summary.json").read_text())["train_loss"][2] is None


@pytest.mark.parametrize("rate", ["1e30", "inf"])
@pytest.mark.parametrize("interval", ["0.1", "1.0"])
def test_a_rate_that_destroys_the_model_stops_the_run_with_the_examples(
    rate: str, interval: str, tmp_path: Path
) -> None:
    words = [f"optim.lr={rate}", f"trainer.val_check_interval={interval}", "logger=tensorboard"]
    with pytest.raises((FloatingPointError, ValueError), match=r"toy/(train|val):\d+#\d+|optim\.lr: expected"):
        run(tmp_path, *words)
    assert not (tmp_path / "summary.json").exists()
