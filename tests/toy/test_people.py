"""The toy world's second edition: its replies, and the person who judges them."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halos.data.records.record import Message, Prompt, Record, last_turn
from halos.toy import Annotator, ToyPeopleSource, world
from halos.toy.model import MAX_NEW_TOKENS, build_model, build_tokenizer, pretrain
from halos.toy.people import is_good, people_prompts, people_reply, utility
from tests.train_runs import run

REFUND = "i bought a lamp on monday. please refund me."
TURNS: Prompt = (Message("user", "x"), Message("assistant", "y"), Message("user", "where is my parcel?"))
SURE = Annotator(noise=0.0, expectation=0.65, curvature=1.0, loss_aversion=2.0)


@pytest.mark.parametrize(
    ("prompt", "reply", "expected"),
    [
        (REFUND, "thanks a lot. we will check it.", 0.8),
        (REFUND, "please send it. best wishes.", 0.7),
        (REFUND, "thanks for writing. we will settle the refund. can you send it? best of luck.", 1.0),
        (REFUND, "thanks a lot. we will check the repayment.", 0.9),
        (REFUND, "we will check it.", 0.4),
        (REFUND, "thanks a lot. hm.", 0.4),
        (REFUND, "stop asking. we will check the refund. best wishes.", 0.1),
        (REFUND, "thanks a lot. we will check the parcel.", 0.1),
        (TURNS, "thanks a lot. we will check the parcel.", 0.9),
        (TURNS, "thanks a lot. we will check the refund.", 0.1),
        (REFUND, "best wishes. thanks a lot.", -0.4),
        (REFUND, "we will check it. we will check it.", -0.4),
        (REFUND, "thanks a lot we will check it.", -0.4),
        (REFUND, "", -0.4),
    ],
)
def test_the_utility_by_hand(prompt: Prompt, reply: str, expected: float) -> None:
    assert utility(prompt, reply) == pytest.approx(expected)
    assert is_good(prompt, reply) == (expected > 0.65)


def drawn(count: int = 1500) -> list[tuple[Prompt, str]]:
    rng = random.Random(0)
    return [(prompt, people_reply(prompt, rng)) for prompt in people_prompts(count)]


def test_replies_have_the_words_and_the_lengths_of_the_language() -> None:
    pairs, known = drawn(), set(world.words())
    lengths = set()
    for prompt, reply in pairs:
        tokens = re.findall(r"\w+|[^\w\s]", reply)
        assert set(tokens) <= known
        assert len(tokens) < MAX_NEW_TOKENS
        if is_good(prompt, reply):
            lengths.add(len(tokens))
    assert len(lengths) > 5, "good replies differ in length"
    assert 0.45 < sum(is_good(*pair) for pair in pairs) / len(pairs) < 0.55


def test_a_good_reply_to_one_prompt_is_often_a_good_reply_to_another() -> None:
    good = [pair for pair in drawn() if is_good(*pair)]
    others = [is_good(good[n - 1][0], reply) for n, (_, reply) in enumerate(good)]
    assert 0.4 < sum(others) / len(others) < 0.6


def test_some_prompts_have_two_turns_and_the_last_one_is_to_be_answered() -> None:
    prompts = people_prompts(1000)
    several = [prompt for prompt in prompts if not isinstance(prompt, str)]
    assert 0.25 < len(several) / len(prompts) < 0.35
    for prompt in several:
        assert isinstance(prompt, tuple)
        first, answer, _ = prompt
        assert world.topic_of(last_turn(prompt)) not in (None, world.topic_of(first.content))
        assert is_good(first.content, answer.content)
    assert people_prompts(50) == prompts[:50]


# The annotator


def test_a_loss_weighs_more_than_a_gain() -> None:
    good = "thanks a lot. we will check it."
    assert SURE.value(REFUND, good) == pytest.approx(0.15)
    assert SURE.value(REFUND, "hm.") == pytest.approx(-2 * 0.65)
    assert replace(SURE, curvature=0.5).value(REFUND, good) == pytest.approx(math.sqrt(0.15))
    assert replace(SURE, curvature=0.5).value(REFUND, "hm.") == pytest.approx(-2 * math.sqrt(0.65))
    longer = "thanks a lot. we will check the refund."
    assert len(longer.split()) == 8
    assert replace(SURE, length_bias=0.1).value(REFUND, longer) == pytest.approx(0.25)
    assert replace(SURE, length_bias=0.1).value(REFUND, good) == pytest.approx(0.15 - 0.1)


def test_answers_without_noise_follow_the_value() -> None:
    rng = random.Random(0)
    for prompt, reply in drawn(300):
        assert SURE.likes(prompt, reply, rng) == is_good(prompt, reply)
        assert SURE.prefers(prompt, reply, "hm.", rng) == (utility(prompt, reply) > 0)
    stars = {reply: SURE.stars(REFUND, reply, rng) for reply in ("hm.", "thanks a lot. we will check the refund.")}
    assert stars == {"hm.": 1, "thanks a lot. we will check the refund.": 4}


def test_with_noise_the_share_of_likes_is_logistic() -> None:
    person, rng, reply = replace(SURE, noise=0.2), random.Random(0), "thanks a lot. we will check it."
    share = sum(person.likes(REFUND, reply, rng) for _ in range(4000)) / 4000
    expected = 1 / (1 + math.exp(-0.15 / 0.2))
    assert share == pytest.approx(expected, abs=3 * math.sqrt(expected * (1 - expected) / 4000))


@pytest.mark.parametrize(
    ("name", "value"),
    [("noise", -1.0), ("loss_aversion", math.nan), ("curvature", 0.0), ("curvature", 1.5), ("expectation", math.inf)],
)
def test_a_person_without_sense_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^annotator\.{name}: expected"):
        Annotator(**{name: value})


# The source


def source(**knobs: Any) -> ToyPeopleSource:
    return ToyPeopleSource(**{"size": 40, "val_size": 20, **knobs})


def replies(records: list[Record] | Any) -> list[str]:
    return [completion.text for record in records for completion in record.completions]


def test_the_same_arguments_give_the_same_records_and_another_seed_others() -> None:
    assert source(seed=3).train() == source(seed=3).train()
    assert source(seed=3).train() != source(seed=4).train()
    assert source(seed=3).val() == source(seed=4).val()


@pytest.mark.parametrize("change", [{"noise": 1.0}, {"length_bias": 0.5}, {"expectation": 0.0}])
def test_another_person_judges_the_same_replies(change: dict[str, float]) -> None:
    plain, other = source(annotator=SURE).train(), source(annotator=replace(SURE, **change)).train()
    assert replies(plain.records) == replies(other.records)
    assert plain != other


def test_held_out_feedback_is_without_noise_and_length_bias() -> None:
    noisy = source(annotator=replace(SURE, noise=2.0, length_bias=1.0))
    assert noisy.val() == source(annotator=SURE).val()
    for record in noisy.val().records:
        assert all(one.desirable == is_good(record.prompt, one.text) for one in record.completions)


def test_every_kind_of_feedback_comes_from_the_same_person() -> None:
    made = {kind: source(feedback=kind, annotator=SURE).train().records for kind in ("labels", "stars", "votes")}
    assert replies(made["labels"]) == replies(made["stars"]) == replies(made["votes"])
    for labelled, starred, voted in zip(*made.values(), strict=True):
        for one, two, three in zip(labelled.completions, starred.completions, voted.completions, strict=True):
            assert one.desirable == (three.score == 5.0)
            assert one.desirable == (two.score >= 3 and is_good(labelled.prompt, one.text))
            assert three.score in (-5.0, 5.0)
    for record in source(feedback="pairs", annotator=SURE, completions_per_prompt=3).train().records:
        assert record.preferences
        for better, worse in record.preferences:
            values = [SURE.value(record.prompt, record.completions[n].text) for n in (better, worse)]
            assert values[0] > values[1]


@pytest.mark.parametrize(
    ("knobs", "key"),
    [
        ({"feedback": "likes"}, "feedback"),
        ({"feedback": "pairs", "completions_per_prompt": 1}, "completions_per_prompt"),
        ({"voters": 0}, "voters"),
    ],
)
def test_what_cannot_be_generated_is_refused(knobs: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: expected"):
        source(**knobs)


def test_the_true_reward_is_the_utility_of_held_out_prompts() -> None:
    judge = source().true_reward()
    assert judge.prompts(5) == world.toy_prompts(5, seed=0, split="val")
    assert judge.reward(REFUND, "thanks a lot. we will check it.") == pytest.approx(0.8)
    assert judge.reward(REFUND, "stop asking.") == 0
    assert judge.desirable(REFUND, "please send it. best wishes.")


@pytest.mark.runs
@pytest.mark.parametrize(
    "words",
    [
        ("loss=kto", "data.source.annotator.loss_aversion=1.5"),
        pytest.param(("loss=dpo", "data.source.feedback=pairs"), marks=pytest.mark.slow),
        pytest.param(("loss=ppo", "data.source.feedback=stars"), marks=pytest.mark.slow),
    ],
)
def test_a_run_on_its_feedback(words: tuple[str, ...], tmp_path: Path) -> None:
    sizes = ("data.source.size=12", "data.source.val_size=4", "sampling.size=4")
    summary = run(tmp_path, "data=toy_people", *sizes, *words)
    assert summary["steps"] > 0
    assert 0 <= summary["samples"]["policy_desirable"] <= 1


def test_a_reference_can_be_pretrained_on_its_replies() -> None:
    tokenizer, losses = build_tokenizer(), list[float]()
    model = build_model(tokenizer)
    pretrain(model, tokenizer, steps=12, batch_size=8, people=True, report=lambda _, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 0.5
