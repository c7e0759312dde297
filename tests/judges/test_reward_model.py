"""Reward models as judges: ours, exported, against the score of a single unpadded row."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.judges.reward_model import RewardModel
from halos.policy.export.card import ModelCard
from halos.policy.export.reward_model import export_reward_model
from halos.policy.heads import RewardHead
from halos.policy.loading import ModelSpec

SPEC = ModelSpec(path="pkg://halos.toy/reference")
SAID = [
    ("i paid twice.", "thanks a lot. we will check the payment. best wishes."),
    ("i bought a lamp on monday. i lost the manual.", "hm."),
    ("it is broken.", "stop asking. we will settle the fault. now leave."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy, tokenizer = SPEC.load(), SPEC.tokenizer()
    head = RewardHead(policy.config.hidden_size)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    where = tmp_path_factory.mktemp("rm") / "model"
    end = ChatTokens(tokenizer, Limits(64)).end_of_turn
    card = ModelCard(loss="bt", base="toy")
    export_reward_model(policy, head.linear.weight, tokenizer, where, end_of_turn=end, card=card)
    return where


def scores_of_rows(folder: Path, limits: Limits, tokenizer: Any = None) -> list[float]:
    """The score of each row by itself, made as training makes it."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens = ChatTokens(tokenizer or SPEC.tokenizer(), limits)
    found = []
    for prompt, text in SAID:
        start, _ = tokens.fit_prompt(tokens.prompt(prompt), "prompt")
        row = start + tokens.fit_completion(tokens.completion(text, prompt), len(start))[0]
        with torch.no_grad():
            found.append(float(model(input_ids=torch.tensor([row])).logits[0, 0]))
    return found


def test_scores_are_those_of_single_rows(folder: Path) -> None:
    expected = scores_of_rows(folder, Limits(64))
    assert len({round(score, 3) for score in expected}) == 3
    assert RewardModel(str(folder), batch_size=2).scores(SAID) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("limits", [Limits(20), Limits(20, 9), Limits(20, 6)])
def test_prompts_are_cut_as_in_training(limits: Limits, folder: Path) -> None:
    expected = pytest.approx(scores_of_rows(folder, limits), abs=1e-4)
    assert RewardModel(str(folder), limits=limits).scores(SAID) == expected


def test_without_a_chat_template_a_run_reads_what_it_was_trained_on_and_others_pairs(
    folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = tmp_path / "model", SPEC.tokenizer()
    shutil.copytree(folder, model)
    (model / "chat_template.jinja").unlink()
    tokenizer.chat_template = None
    expected = pytest.approx(scores_of_rows(folder, Limits(64), tokenizer), abs=1e-4)
    assert RewardModel(str(model)).scores(SAID) != expected
    (tmp_path / "config.yaml").touch()
    assert RewardModel(str(tmp_path)).scores(SAID) == expected


def test_the_better_scored_completion_wins(folder: Path) -> None:
    judge = RewardModel(str(folder))
    (a, b) = judge.scores([SAID[0], (SAID[0][0], "hm.")])
    assert judge.verdicts([(*SAID[0], "hm."), (SAID[0][0], "hm.", SAID[0][1]), (*SAID[0], SAID[0][1])]) == [
        float(a > b),
        float(b > a),
        0.5,
    ]


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"judge.path: expected a reward model: a run's folder"):
        RewardModel(None)
    with pytest.raises(ValueError, match=r"judge.batch_size: expected a whole number from 1 on, found 0"):
        RewardModel(str(tmp_path), batch_size=0)
    with pytest.raises(ValueError, match=r"judge.path: .* could not be loaded as a classifier"):
        RewardModel(str(tmp_path)).scores(SAID)
    SPEC.load().save_pretrained(tmp_path)
    SPEC.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a reward model, but .* lacks the weights score"):
        RewardModel(str(tmp_path)).scores(SAID)


@pytest.mark.parametrize("name", ["batch_size", "max_length"])
@pytest.mark.parametrize("value", [True, 1.5, 0, None])
def test_what_is_no_whole_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^judge\.{name}: expected a whole number from"):
        RewardModel("m", **{name: value})


def test_what_can_be_told_without_weights_is_told_by_the_check(folder: Path, tmp_path: Path) -> None:
    RewardModel(str(folder)).check()
    shutil.copytree(folder, tmp_path / "two")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "two" / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    (tmp_path / "two" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"judge.path: expected one score, .* has 2 classes"):
        RewardModel(str(tmp_path / "two")).check()
    with pytest.raises(ValueError, match=r"judge.path: .*gone could not be loaded as a classifier"):
        RewardModel(str(tmp_path / "gone")).check()
