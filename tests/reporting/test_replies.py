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
from halos.sampling.replies import Reply
from halos.toy.model import ASSISTANT, GOOD

PROMPTS: list[Any] = ["i bought a lamp on monday. i paid twice.", (Message("user", "i paid twice."),)]


@pytest.fixture(scope="module")
def objectives() -> dict[str, Any]:
    made = {}
    for kind in (SFT, CSFT):
        policy = ModelSpec(path="pkg://halos.toy/reference").load()
        made[kind.__name__] = kind(Backbone(policy, with_reference=False))
        made[kind.__name__].configure_model()
    return made


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[list[str]]]]:
    """Name and rows of each table."""
    found: list[tuple[str, list[list[str]]]] = []
    board = SimpleNamespace(log_table=lambda name, columns, rows, step: found.append((name, rows)))
    monkeypatch.setattr(replies, "boards", lambda trainer: [board] if trainer.is_global_zero else [])
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
    ((name, rows),) = shown
    assert name == "samples"
    assert len(rows) == 2
    for row, said in zip(rows, ("i bought a lamp on monday. i paid twice.", "i paid twice."), strict=True):
        prompt, before, reply = row
        assert said in prompt
        assert ASSISTANT in prompt
        assert before == "–"  # no reference was read
        assert len(reply.split()) > 2


def test_replies_depend_on_seed_and_step_alone(objectives: dict[str, Any], shown: list[Any]) -> None:
    for seed, step in ((0, 0), (0, 0), (1, 0), (0, 1)):
        validate(objectives["SFT"], PROMPTS * 4, seed=seed, step=step)
    assert shown[0] == shown[1]
    assert shown[0] not in shown[2:]
    assert shown[2] != shown[3]


def test_the_first_replies_alone_are_shown(objectives: dict[str, Any], shown: list[Any]) -> None:
    validate(objectives["SFT"], PROMPTS * 4, shown=3)
    ((_, rows),) = shown
    assert len(rows) == 3


def test_a_conditioned_policy_is_asked_for_desirable_replies(objectives: dict[str, Any], shown: list[Any]) -> None:
    validate(objectives["CSFT"], PROMPTS)
    ((_, rows),) = shown
    assert all(prompt.replace(" ", "").endswith(ASSISTANT + GOOD) for prompt, _, _ in rows)


def test_a_long_prompt_is_cut_as_in_training(objectives: dict[str, Any], shown: list[Any]) -> None:
    validate(objectives["SFT"], ["i bought a lamp on monday. " * 9 + "i paid twice."], max_length=40)
    ((_, ((prompt, _, _),)),) = shown
    assert prompt.count("lamp") == 2
    assert "i paid twice." in prompt


def test_nothing_is_sampled_elsewhere_or_without_prompts(objectives: dict[str, Any], shown: list[Any]) -> None:
    validate(objectives["SFT"], [])
    validate(objectives["SFT"], PROMPTS, rank_zero=False)
    assert shown == []


@pytest.mark.parametrize(("moves", "expected"), [(False, [True, False, False]), (True, [True, True, True])])
def test_a_reference_that_stands_still_replies_once(
    moves: bool, expected: list[bool], objectives: dict[str, Any], monkeypatch: pytest.MonkeyPatch, shown: list[Any]
) -> None:
    drawn: list[bool] = []

    def draw(*_: Any, before: int | None, **__: Any) -> list[Reply]:
        drawn.append(before is not None)
        return [Reply(n, [5], False, 0.1, None if before is None else [6]) for n in range(2)]

    monkeypatch.setattr(replies, "policy_replies", draw)
    tokens = ChatTokens(ModelSpec(path="pkg://halos.toy/reference").tokenizer(), Limits(64, 44))
    callback = SampledReplies(tokens, PROMPTS, shown=2, max_new_tokens=3, seed=0, reference_moves=moves)
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=0)
    for _ in expected:
        callback.measure(trainer, objectives["SFT"])
    assert drawn == expected
    assert all(row[1] == tokens.tokenizer.decode([6]) for _, rows in shown for row in rows)
