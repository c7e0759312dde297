"""The replies that a person reads at each validation."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from halos.data.records.record import Message
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.objectives import CSFT, SFT
from halos.policy import Backbone, ModelSpec
from halos.reporting import replies
from halos.reporting.replies import SampledReplies
from halos.toy.model import ASSISTANT, GOOD

PROMPTS = ["i bought a lamp on monday. i paid twice.", (Message("user", "i paid twice."),)]


@pytest.fixture(scope="module")
def objectives() -> dict[str, Any]:
    made = {}
    for kind in (SFT, CSFT):
        policy = ModelSpec(path="pkg://halos.toy/reference").load()
        made[kind.__name__] = kind(Backbone(policy, with_reference=False))
        made[kind.__name__].configure_model()
    return made


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(replies, "log_text", lambda trainer, tag, texts: found.append((tag, texts)))
    return found


def validate(
    objective: Any, prompts: list[Any], *, rank_zero: bool = True, max_length: int = 64, step: int = 0, **options: Any
) -> None:
    tokens = ChatTokens(ModelSpec(path="pkg://halos.toy/reference").tokenizer(), Limits(max_length, max_length - 20))
    callback = SampledReplies(tokens, prompts, **{"shown": 9, "max_new_tokens": 12, "seed": 0, **options})
    trainer: Any = SimpleNamespace(
        is_global_zero=rank_zero,
        global_step=step,
        state=SimpleNamespace(fn="fit"),
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(objective), "log_dict", lambda *_: None)
        callback.on_validation_epoch_end(trainer, objective)


def test_each_prompt_is_shown_with_its_reply(objectives: dict[str, Any], shown: list[Any]) -> None:
    validate(objectives["SFT"], PROMPTS)
    ((tag, texts),) = shown
    assert tag == "samples"
    assert len(texts) == 2
    for text, said in zip(texts, ("i bought a lamp on monday. i paid twice.", "i paid twice."), strict=True):
        prompt, between, reply = text.split("\n\n")
        assert said in prompt
        assert ASSISTANT in prompt
        assert between == "**reply**"
        assert len(reply.split()) > 2


EVIL = "a ![x](http://127.0.0.1/x.png) <img src=x> **b**\n\n# c \x1b]0;t\x07\u202e |"


def test_prompts_and_replies_are_no_markdown(
    objectives: dict[str, Any], shown: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.decode", lambda *_, **__: EVIL)
    validate(objectives["SFT"], PROMPTS)
    ((_, texts),) = shown
    for text in texts:
        blocks, (between,) = [], [line for line in text.split("\n") if line.startswith("*")]
        assert between == "**reply**"
        blocks = [line for line in text.split("\n") if line and line != between]
        # An indented line after an empty one is code for every Markdown; nothing else follows a paragraph here.
        assert all(line.startswith("    ") for line in blocks)
        assert r"# c \x1b]0;t\x07\u202e |" in text


def test_replies_depend_on_seed_and_step_alone(objectives: dict[str, Any], shown: list[Any]) -> None:
    for seed, step in ((0, 0), (0, 0), (1, 0), (0, 1)):
        validate(objectives["SFT"], PROMPTS * 4, seed=seed, step=step)
    assert shown[0] == shown[1]
    assert shown[0] not in shown[2:]
    assert shown[2] != shown[3]


def test_the_first_replies_alone_are_shown(objectives: dict[str, Any], shown: list[Any]) -> None:
    validate(objectives["SFT"], PROMPTS * 4, shown=3)
    ((_, texts),) = shown
    assert len(texts) == 3


def test_a_conditioned_policy_is_asked_for_desirable_replies(objectives: dict[str, Any], shown: list[Any]) -> None:
    validate(objectives["CSFT"], PROMPTS)
    ((_, texts),) = shown
    assert all(text.partition("\n\n")[0].replace(" ", "").endswith(ASSISTANT + GOOD) for text in texts)


def test_a_long_prompt_is_cut_as_in_training(objectives: dict[str, Any], shown: list[Any]) -> None:
    validate(objectives["SFT"], ["i bought a lamp on monday. " * 9 + "i paid twice."], max_length=40)
    ((_, (text,)),) = shown
    assert text.count("lamp") == 2
    assert "i paid twice." in text


def test_nothing_is_sampled_elsewhere_or_without_prompts(objectives: dict[str, Any], shown: list[Any]) -> None:
    validate(objectives["SFT"], [])
    validate(objectives["SFT"], PROMPTS, rank_zero=False)
    assert shown == []
