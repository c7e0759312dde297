"""Whole runs of single losses: control tokens, a reward model, humanline, and objectives from elsewhere."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import halos.commands.assembly
import halos.commands.finish
from halos.data.records.record import messages_of
from halos.toy import ToySource
from halos.toy.model import BAD, END, GOOD
from tests.configs import compose
from tests.train_runs import QUICK, column, run, table

pytestmark = pytest.mark.runs


def test_a_conditioned_model_trained_on_is_conditioned_once(tmp_path: Path) -> None:
    first = tmp_path / "first"
    run(first, "loss=csft", "trainer.max_steps=1")
    cfg = compose(*QUICK, "loss=csft", f"model.path={first / 'model'}", f"output_dir={tmp_path / 'second'}")
    prepared = halos.commands.assembly.assemble(cfg)
    controls: Any = prepared.tokens.tokenizer.convert_tokens_to_ids([GOOD, BAD])
    for row in prepared.data.rows["train"].table:
        assert [token for token in row.prompt if token in controls] == [controls[0 if row.desirable else 1]]


def test_control_tokens_that_are_new_to_the_vocabulary_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    compare = halos.commands.finish.compare  # type: ignore[attr-defined]
    monkeypatch.setattr(halos.commands.finish, "compare", lambda *a, **k: (compared.extend(a[:2]), compare(*a, **k))[1])
    tokens = ("loss.desirable_token='<yes>'", "loss.undesirable_token='<no>'")
    run(tmp_path, "loss=csft", *tokens, "trainer.max_steps=1", "sampling.size=4")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert max(tokenizer.convert_tokens_to_ids(["<yes>", "<no>"])) == len(tokenizer) - 1
    # The policy can say them, so the model that it is compared with has to know them too.
    assert [made.get_input_embeddings().weight.shape[0] for made in (model, *compared)] == [len(tokenizer)] * 3


def test_labels_of_steps_are_learned_from(tmp_path: Path) -> None:
    files, labelled = [tmp_path / "train.jsonl", tmp_path / "val.jsonl"], 0
    lines: list[str] = []
    for n, record in enumerate(ToySource(size=6, val_size=1).train().records):
        words = record.completions[0].text.split(" ")
        texts = [words[0], *(f" {word}" for word in words[1:])]
        steps = [{"text": text, "label": (n + place) % 2 == 0} for place, text in enumerate(texts)]
        turns = [turn.as_dict() for turn in messages_of(record.prompt)]
        lines.append(json.dumps({"prompt": turns, "steps": steps, "label": n % 2 == 0}) + "\n")
        labelled += len(steps) if n < 4 else 0
    for file, part in zip(files, (lines[:4], lines[4:]), strict=True):
        file.write_text("".join(part))
    words = ["data=files", f"data.train={files[0]}", f"data.val={files[1]}", "trainer.max_steps=2"]
    summary = run(tmp_path / "run", "loss=step_kto", *words)
    assert summary["train_loss"][0] == pytest.approx(0.5, abs=1e-6)
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())["splits"]["train"]
    assert report["counts"]["steps with a label"] == labelled
    assert report["counts"]["examples"] == labelled + 4
    assert report["counts"]["examples with a weight"] == labelled
    with pytest.raises(
        ValueError, match=r"^data\.streaming: expected false for a loss that learns from labels of steps"
    ):
        run(tmp_path / "stream", "loss=step_kto", *words[:2], "data.streaming=true")
    with pytest.raises(ValueError, match=r"^loss\.step_labels: expected completions whose steps have labels"):
        run(tmp_path / "toy", "loss=step_kto")


def test_a_reward_model_is_exported_as_a_classifier_with_its_scores(tmp_path: Path) -> None:
    words = ["loss=bradley_terry", "data.source.feedback=pairs", "sampling.size=8", "sampling.prompts=2"]
    summary = run(tmp_path, *words, "trainer.val_check_interval=1")
    assert column(tmp_path, "val/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert "samples" not in summary
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    scores: dict[bool, list[float]] = {True: [], False: []}
    for record in ToySource(size=1, val_size=4, feedback="pairs").val().records:
        turns = [turn.as_dict() for turn in messages_of(record.prompt)]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        for pair in record.preferences:
            for chosen, index in zip((True, False), pair, strict=True):
                text = prompt + record.completions[index].text + END
                inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
                scores[chosen].append(float(model(input_ids=inputs["input_ids"]).logits[0, 0].detach()))
    for name, values in (("chosen", scores[True]), ("rejected", scores[False])):
        assert sum(values) / len(values) == pytest.approx(summary["metrics"][f"rewards/{name}"], rel=1e-4)
    assert abs(summary["metrics"]["rewards/margins"]) > 1e-3


def test_a_step_without_undesirable_completions_has_no_metrics_of_them(tmp_path: Path) -> None:
    run(tmp_path, "data.batch_size=1", "trainer.max_steps=8")
    rows = [row for row in table(tmp_path) if row["train/loss"]]
    assert len(rows) == 8
    sides = [(bool(row["train/rewards/chosen"]), bool(row["train/rewards/rejected"])) for row in rows]
    assert set(sides) == {(True, False), (False, True)}
    assert "train/rewards/margins" not in rows[0]


def test_humanline_changes_the_loss_once_the_policy_has_moved(tmp_path: Path) -> None:
    words = ["trainer.max_steps=2", "optim.warmup=0"]
    plain = run(tmp_path / "plain", *words)
    narrow = ["humanline.enabled=true", "humanline.log_epsilon_P=-0.001", "humanline.log_epsilon_R=0.001"]
    clamped = run(tmp_path / "clamped", *words, *narrow)
    assert clamped["train_loss"][0] == plain["train_loss"][0]
    assert clamped["train_loss"][1] != plain["train_loss"][1]


def test_an_objective_from_outside_the_package_trains(my_module: str, tmp_path: Path) -> None:
    mine = ["loss=sft", f"loss._target_={my_module}.Mine", "loss.name=mine", "+loss.margin=2.0"]
    summary = run(tmp_path / "run", *mine, "data.source.feedback=pairs", "trainer.max_steps=2")
    assert summary["loss"] == "mine"
    assert len(summary["train_loss"]) == 2
    first = column(tmp_path / "run", "val/logps/chosen")[0] - column(tmp_path / "run", "val/logps/rejected")[0]
    assert column(tmp_path / "run", "val/loss")[0] >= 2 - first - 1e-6  # E max(0, u) ≥ E u


def test_the_target_of_a_loss_can_be_replaced_alone(my_module: str, tmp_path: Path) -> None:
    target = [f"loss._target_={my_module}.Mine", "~loss.beta"]
    summary = run(tmp_path / "run", "loss=hinge", *target, "data.source.feedback=pairs", "trainer.max_steps=1")
    assert len(summary["train_loss"]) == 1


def test_a_formula_is_printed_and_trained_from_step_0_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    formula = "where(u>0, u**0.88, -2.25*(-u)**0.88)"
    run(tmp_path, "loss=halo", f"loss.value='{formula}'", "trainer.max_steps=2", "optim.warmup=0")
    said = capsys.readouterr().out
    assert "v(u) = where(u>0, u^0.88, −2.25·(−u)^0.88)" in said
    assert "ε = 0.001 of 0" in said
    assert "HALO, with reward log π_θ/π_ref" in said
    # At step 0 each u is 0: a loss of 0 with a gradient that is not.
    losses = column(tmp_path, "train/loss")
    assert losses[1] == pytest.approx(0.0, abs=1e-5)
    assert column(tmp_path, "train/grad_norm")[1] > 0.1
    assert abs(losses[2]) > 1e-3
