"""What a run leaves behind, for every loss: files, summary, metrics, and a model that plain transformers load."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos.data.records.record import messages_of
from halos.reporting.replies import STALE
from halos.toy import ToySource
from halos.toy.model import ASSISTANT, BAD, END, GOOD
from halos.training.run_folder import CONTENTS
from tests.configs import options
from tests.train_runs import LABELS, SPEED, SUMMARY, column, is_paired, jsonl, run, run_until, table

pytestmark = pytest.mark.runs

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
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "bco_pair": 2 * math.log(2),
    "discopop": 0.5 + 0.5 * math.log(2),
    "dpo_norm": math.log(2),
    "exo": -math.log(2) - 0.5 * math.log(0.999 * 0.001),
    "f_dpo": math.log(2),
    "hinge": 1.0,
    "ld_dpo": math.log(2),
    "nca": 2 * math.log(2),
    "nca_pair": 2 * math.log(2),
    "sppo": 50.0,
}
NAMES = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/auc",
    "logps/chosen",
    "logps/rejected",
    "log_ratio/chosen",
    "log_ratio/rejected",
    "log_ratio/mismatched",
    "logps/mismatched",
    "z0",
    "z0/raw",
    "loss/policy",
    "loss/critic",
    "loss/kl_penalty",
}
OWN_NAMES = {
    "bco": {"delta"},
    "wpo": {"log_collision"},
    "bco_pair": {"delta"},
    "cpo": {"loss/prefer", "loss/sft"},
    "grpo": {"groups/incomplete"},
    "cpo_simpo": {"loss/simpo", "loss/sft"},
    "irpo": {"loss/dpo", "loss/sft"},
    "mix": {"loss/dpo", "loss/sft"},
    "mpo": {"loss/dpo", "loss/bco", "loss/sft", "bco/delta"},
    "orpo": {"loss/odds", "loss/sft"},
    "slic": {"loss/calibration", "loss/sft"},
}
TRAIN_NAMES = NAMES | {"examples_per_second", "tokens_per_second", "grad_norm", "lr", "examples", "epoch"}
LOSSES = [option for option in options("loss") if option not in ("bradley_terry", "step_kto")]
"""All that learn from the toy world's labels and write replies."""
ALIKE = {
    "halo_dpo",
    "halo_kto",
    "halo_kto_concave",
    "halo_kto_risk_neutral",
    "cdpo",
    "kto_balanced",
    "kto_zero",
    "alphapo",
    "dpo_norm",
    "ld_dpo",
    "r_dpo",
    "wpo",
}
ALIKE |= {
    "exo_rw",
    "infonca",
    "nca",
    "aot",
    "aot_unpaired",
    "discopop",
    "exo",
    "f_dpo",
    "hinge",
    "nca_pair",
    "sppo",
    "cpo_simpo",
    "irpo",
    "mpo",
}
"""Losses that report what another does."""
WITHOUT_REFERENCE = {"alphapo", "cpo", "cpo_simpo", "csft", "kto_reference_free", "orpo", "sft", "simpo", "slic"}
WITHOUT_REWARDS = {"csft", "sft"}
STEPS = 3


Trained = tuple[str, Path, dict[str, Any]]
"""Name of the loss, run folder and summary."""


@pytest.fixture(
    scope="module", params=[pytest.param(loss, marks=[pytest.mark.slow] if loss in ALIKE else []) for loss in LOSSES]
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    chosen = [f"loss={request.param}", f"data.source.feedback={'pairs' if is_paired(request.param) else 'labels'}"]
    sampling = ["sampling.prompts=2", "sampling.size=8", "logger=tensorboard"]
    return (
        request.param,
        folder,
        run(folder, *chosen, *sampling, f"trainer.max_steps={STEPS}", "trainer.val_check_interval=1"),
    )


def test_a_run_leaves_exactly_the_promised_files(trained: Trained) -> None:
    _, folder, _ = trained
    assert {file.name for file in folder.iterdir()} == set(CONTENTS) - {"evaluation"}
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == STEPS
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))


def test_the_summary_is_what_train_returns_with_exactly_the_promised_keys(
    trained: tuple[str, Path, dict[str, Any]],
) -> None:
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
    assert summary["seed"] == 0
    assert {"python", "torch", "transformers", "lightning"} <= set(summary["versions"])
    paths = summary["paths"]
    assert paths.pop("best_checkpoint") is None
    assert all(Path(path).exists() and path.startswith(str(folder)) for path in paths.values())


def test_the_configuration_is_kept_resolved(trained: Trained) -> None:
    loss, folder, _ = trained
    kept = OmegaConf.load(folder / "config.yaml")
    assert kept.loss.name == loss
    assert kept.output_dir == str(folder)
    assert "${" not in (folder / "config.yaml").read_text()


def test_metrics_csv_has_each_step_once_under_known_names(trained: Trained) -> None:
    loss, folder, summary = trained
    with (folder / "metrics.csv").open() as stream:
        names = set(next(csv.reader(stream)))
    of_both = NAMES | OWN_NAMES.get(loss, set())
    allowed = {f"train/{name}" for name in TRAIN_NAMES | of_both} | {f"val/{name}" for name in of_both}
    assert names <= {"step", *allowed, *STALE}
    assert {"train/loss", "train/lr", "train/grad_norm", *SPEED, "val/loss", "train/logps/chosen"} <= names
    rows = [row["step"] for row in table(folder) if row["train/loss"]]
    assert rows == [str(step) for step in range(1, STEPS + 1)]
    assert list(column(folder, "train/loss").values()) == pytest.approx(summary["train_loss"], rel=1e-6)
    assert list(column(folder, "val/loss")) == list(range(STEPS + 1))
    assert column(folder, "train/examples") == {step: 4.0 * step for step in range(1, STEPS + 1)}
    examples = 12 if is_paired(loss) else 24
    if loss not in (
        "csft",
        "exo_rw",
        "grpo",
        "infonca",
        "nca",
        "sft",
    ):  # of which some views have other numbers of examples
        assert column(folder, "train/epoch") == {step: 4.0 * step / examples for step in range(1, STEPS + 1)}


def test_the_summary_has_the_metrics_of_the_last_validation(trained: Trained) -> None:
    _, folder, summary = trained
    last = next(row for row in reversed(table(folder)) if row["val/loss"])
    assert last["step"] == str(STEPS)
    assert summary["metrics"] == {k.removeprefix("val/"): float(v) for k, v in last.items() if v and "val/" in k}


def test_before_the_first_step_the_policy_is_the_reference(trained: Trained) -> None:
    loss, folder, _ = trained
    first = {name: float(value) for name, value in table(folder)[0].items() if value}
    assert first.pop("step") == 0
    assert ("val/rewards/margins" in first) == (loss not in WITHOUT_REWARDS)
    if loss in AT_STEP_0:
        assert first["val/loss"] == pytest.approx(AT_STEP_0[loss], rel=1e-6, abs=1e-6)
    if loss in WITHOUT_REFERENCE:
        return
    expected = {"rewards/accuracies": 0.5, "rewards/auc": 0.5}
    for name, value in first.items():
        if any(word in name for word in ("rewards/", "log_ratio/", "z0")):
            assert value == pytest.approx(expected.get(name.removeprefix("val/"), 0.0), abs=1e-5), name


def chosen_logprob(folder: Path, loss: str) -> float:
    """The mean log-prob of what people liked in the validation data, by plain transformers and one at a time."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    found = []
    for record in ToySource(size=1, val_size=4, feedback="pairs" if is_paired(loss) else "labels").val().records:
        liked = [record.completions[better].text for better, _ in record.preferences]
        liked += [completion.text for completion in record.completions if completion.desirable]
        for text in liked:
            turns = [turn.as_dict() for turn in messages_of(record.prompt)]
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            ids = torch.tensor([prompt + tokenizer(text + END, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scored = logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            found.append(float(scored.sum()))
    return sum(found) / len(found)


def test_plain_transformers_load_the_trained_policy(trained: Trained) -> None:
    loss, folder, summary = trained
    assert chosen_logprob(folder, loss) == pytest.approx(summary["metrics"]["logps/chosen"], rel=1e-5)
    assert summary["metrics"]["logps/chosen"] != pytest.approx(column(folder, "val/logps/chosen")[0], rel=1e-4)


def test_the_model_card_names_the_loss_and_its_results(trained: Trained) -> None:
    loss, folder, summary = trained
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert f"trained with the loss `{loss}`\n" in card
    assert f"| `loss` | {float(format(summary['metrics']['loss'], '.4g')):g} |" in card
    assert f"| `steps` | `{summary['steps']}` |" in card
    assert f"| `examples_per_step` | `{summary['examples'] // summary['steps']}` |" in card


def test_the_exported_template_conditions_on_the_desirable_token_once(
    trained: tuple[str, Path, dict[str, Any]],
) -> None:
    loss, folder, _ = trained
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    turns = [{"role": "user", "content": "i bought a lamp."}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text.endswith(ASSISTANT + GOOD if loss == "csft" else ASSISTANT)
    assert (text.count(GOOD), text.count(BAD)) == (int(loss == "csft"), 0)
    assert GOOD not in tokenizer.apply_chat_template(turns, tokenize=False)


def test_the_console_says_what_will_happen_how_far_it_is_and_where_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("trainer.enable_progress_bar=true", "trainer.accumulate_grad_batches=2", "checkpoint.every=1")
    run_until("on_train_batch_start", 2, tmp_path, *words)
    capsys.readouterr()
    run(tmp_path, *words, "resume=auto")
    out = capsys.readouterr().out
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines)) <= 80 + len(str(tmp_path))  # a path is not broken
    for line in (
        "data        24 examples, 1 pass",
        "steps       3 of 8 examples (4 a device × 1 device × 2 micro-batches)",
        "resume      goes on from step 2",
        f"output      {tmp_path}",
    ):
        assert line in lines, line
    # Forward passes of 2 × 8 examples, next to the threefold work of training on 24, of about the same length: 22 %.
    (share,) = re.findall(r"validation  2 times 8 examples, about (\d+)% of training's computation", out)
    assert 16 <= int(share) <= 30
    assert re.search(r"^  completion \((un)?desirable\): ", out, re.MULTILINE)
    (last,) = [line for line in lines if line.startswith("step ")]  # the only step is the first and the last
    assert last.startswith("step 3/3  pass 1/1  loss 0.")
    (validation,) = [line for line in lines if line.startswith("validation at")]
    assert validation.startswith("validation at step 3  loss 0.")
    assert "Epoch" not in out


def test_a_run_without_validation_says_how_to_have_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(jsonl(*LABELS), encoding="utf-8")
    run(tmp_path / "run", "data=files", f"data.train={file}", "trainer.max_steps=1")
    assert capsys.readouterr().out.count("data.val_size=200 would hold 200 records out") == 2  # in plan and result
