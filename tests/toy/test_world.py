"""The toy language and its true reward, by hand."""

from __future__ import annotations

import re

import pytest

from halos.toy import world
from halos.toy.world import is_complete, is_desirable, is_on_topic, is_polite, prompts_of, topic_of, toy_prompts, words

PROMPT = "i bought a lamp on monday. where is my parcel?"


@pytest.mark.parametrize(
    ("completion", "checks"),
    [
        ("thanks a lot. we will check the parcel. best wishes.", (True, True, True)),
        ("thanks for asking. we will settle the delivery. best of luck.", (True, True, True)),
        ("stop whining. we will check the parcel. best wishes.", (False, True, True)),
        ("thanks a lot. we will check the parcel. now leave.", (False, True, True)),
        ("thanks a lot. we will check the refund. best wishes.", (True, False, True)),
        ("thanks a lot. we will check the weather. best wishes.", (True, False, True)),
        ("thanks a lot. we will check the parcel.", (True, True, False)),
        ("thanks a lot. we will check the parcel. best wishes", (True, True, False)),
        ("we will check the parcel. best wishes.", (True, True, False)),
        ("thanks a lot. best wishes.", (True, False, False)),
        ("hm. we will check the parcel. hm.", (False, True, False)),
        ("thanks a lot. we will check the parcel. best wishes. best wishes.", (True, True, False)),
        ("thanks a lot. we will check the parcel refund. best wishes.", (True, False, False)),
        ("", (False, False, False)),
        ("  \n\t", (False, False, False)),
        ("(((*[\\", (False, False, False)),
        ("\x00\ud800 parcels 🙂" * 1000, (False, False, False)),
    ],
)
def test_true_reward_is_the_mean_of_three_checks(completion: str, checks: tuple[bool, bool, bool]) -> None:
    assert (is_polite(completion), is_on_topic(PROMPT, completion), is_complete(completion)) == checks
    assert world.true_reward(PROMPT, completion) == sum(checks) / 3
    assert is_desirable(PROMPT, completion) == all(checks)


@pytest.mark.parametrize("prompt", ["", "what is the parcel?", "(("])
def test_nothing_is_on_topic_for_a_prompt_outside_the_language(prompt: str) -> None:
    assert topic_of(prompt) is None
    assert world.true_reward(prompt, "thanks a lot. we will check the parcel. best wishes.") == 2 / 3


def test_splits_share_no_prompt_yet_every_word() -> None:
    train, val = prompts_of("train"), prompts_of("val")
    assert len(set(train)) == len(train) > 5000
    assert len(set(val)) == len(val) > 1000
    assert not set(train) & set(val)
    assert set(re.findall(r"\w+", " ".join(train))) == set(re.findall(r"\w+", " ".join(val)))


def test_every_prompt_has_exactly_one_problem() -> None:
    problems = [(name, problem) for name, topic in world.TOPICS.items() for problem in topic.problems]
    for prompt in prompts_of("train") + prompts_of("val"):
        assert [name for name, problem in problems if problem in prompt] == [topic_of(prompt)]


def test_no_two_topics_share_a_noun() -> None:
    nouns = [noun for topic in world.TOPICS.values() for noun in topic.nouns] + list(world.CHAT)
    assert len(set(nouns)) == len(nouns)


def test_toy_prompts_are_seeded_distinct_and_extend() -> None:
    some = toy_prompts(100, seed=1)
    assert some == toy_prompts(200, seed=1)[:100] != toy_prompts(100, seed=2)
    assert len(set(some)) == 100
    assert set(some) <= set(prompts_of("val"))
    assert set(toy_prompts(100, split="train")) <= set(prompts_of("train"))


@pytest.mark.parametrize(("size", "split", "name"), [(0, "val", "size"), (99999, "val", "size"), (1, "test", "split")])
def test_bad_prompt_requests_name_the_argument(size: int, split: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .* found"):
        toy_prompts(size, split=split)


def test_words_cover_prompts() -> None:
    assert set(re.findall(r"\w+|[^\w\s]", " ".join(prompts_of("train")))) < set(words())
    assert words() == sorted(set(words()))
