"""The toy world's second edition: its replies, and the person who judges them."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace

import pytest

from halos.data.records.record import Message, Prompt, last_turn
from halos.toy import Annotator, world
from halos.toy.model import MAX_NEW_TOKENS
from halos.toy.people import is_good, people_prompts, utility
from halos.toy.writers import BEGINNER, STAFF, Writer, people_reply

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


def drawn(count: int = 1500, writer: Writer = STAFF) -> list[tuple[Prompt, str]]:
    rng = random.Random(0)
    return [(prompt, people_reply(prompt, rng, writer)) for prompt in people_prompts(count)]


@pytest.mark.parametrize(("writer", "good"), [(BEGINNER, 0.28), (STAFF, 0.82)], ids=["beginner", "staff"])
def test_replies_have_the_words_and_the_lengths_of_the_language(writer: Writer, good: float) -> None:
    pairs, known = drawn(writer=writer), set(world.words())
    lengths = set()
    for prompt, reply in pairs:
        tokens = re.findall(r"\w+|[^\w\s]", reply)
        assert set(tokens) <= known
        assert len(tokens) < MAX_NEW_TOKENS
        if is_good(prompt, reply):
            lengths.add(len(tokens))
    assert len(lengths) > 5, "good replies differ in length"
    assert sum(is_good(*pair) for pair in pairs) / len(pairs) == pytest.approx(good, abs=0.03)


def test_a_good_reply_to_one_prompt_is_often_a_good_reply_to_another() -> None:
    good = [pair for pair in drawn() if is_good(*pair)]
    others = [is_good(good[n - 1][0], reply) for n, (_, reply) in enumerate(good)]
    assert 0.7 < sum(others) / len(others) < 0.9


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
    assert replace(SURE, length_bias=0.05).value(REFUND, longer) == pytest.approx(0.25 - 0.1)
    assert replace(SURE, length_bias=0.03).value(REFUND, good) == pytest.approx(0.15 - 0.09)


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
