"""Toy feedback: determinism, knobs against binomial bounds, preferences against the true reward."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from halos.data.records.record import Record
from halos.toy.feedback import behaviour_completion, toy_feedback
from halos.toy.world import is_complete, is_desirable, is_on_topic, is_polite, prompts_of, true_reward


def assert_share(hits: int, total: int, share: float) -> None:
    """``hits`` lies within four standard deviations of a binomial draw."""
    assert abs(hits - total * share) <= 4 * math.sqrt(total * share * (1 - share))


def labels_of(records: list[Record]) -> list[tuple[bool, bool]]:
    """(true, recorded) labels of every completion."""
    return [
        (is_desirable(str(record.prompt), completion.text), bool(completion.desirable))
        for record in records
        for completion in record.completions
    ]


def test_same_arguments_same_records() -> None:
    assert toy_feedback(size=50, seed=3) == toy_feedback(size=50, seed=3)
    assert toy_feedback(size=50, seed=3) != toy_feedback(size=50, seed=4)
    assert toy_feedback(size=50, seed=3) == toy_feedback(size=80, seed=3)[:50]


@pytest.mark.parametrize("feedback", ["labels", "pairs"])
def test_splits_are_disjoint(feedback: str) -> None:
    train = {record.prompt for record in toy_feedback(size=500, feedback=feedback)}
    val = {record.prompt for record in toy_feedback(size=500, feedback=feedback, split="val")}
    assert len(train) == len(val) == 500
    assert not train & val


def test_labels_are_the_truth_and_half_desirable() -> None:
    records = toy_feedback(size=2000)
    labels = labels_of(records)
    assert len(records) == 2000
    assert len(labels) == 4000
    assert all(true == recorded for true, recorded in labels)
    assert_share(sum(true for true, _ in labels), 4000, 0.9 * 0.86 * 0.65)
    assert all(completion.score is None for record in records for completion in record.completions)


def test_behaviour_fails_every_check_somewhere_and_is_never_empty() -> None:
    rng = random.Random(0)
    draws = [(prompt, behaviour_completion(prompt, rng)) for prompt in prompts_of("train")[::5]]
    failed = {(is_polite(text), is_on_topic(prompt, text), is_complete(text)) for prompt, text in draws}
    assert {(False, True, True), (True, False, True), (True, True, False)} < failed
    assert all(text for _, text in draws)
    with pytest.raises(ValueError, match="prompt: expected one of the toy language"):
        behaviour_completion("hello", rng)


def test_noise_flips_labels() -> None:
    labels = labels_of(toy_feedback(size=2000, noise=0.2))
    assert_share(sum(true != recorded for true, recorded in labels), len(labels), 0.2)
    assert all(true != recorded for true, recorded in labels_of(toy_feedback(size=50, noise=1.0)))


def test_keep_shares_are_of_each_class() -> None:
    whole = [true for true, _ in labels_of(toy_feedback(size=2000))]
    kept = [true for true, _ in labels_of(toy_feedback(size=2000, keep_desirable=0.1, keep_undesirable=0.7))]
    assert_share(sum(kept), sum(whole), 0.1)
    assert_share(len(kept) - sum(kept), len(whole) - sum(whole), 0.7)
    assert not any(true for true, _ in labels_of(toy_feedback(size=50, keep_desirable=0.0)))


def test_knobs_leave_the_texts_alone() -> None:
    def texts(**knobs: Any) -> list[str]:
        return [completion.text for record in toy_feedback(size=50, **knobs) for completion in record.completions]

    assert texts() == texts(noise=0.5)
    assert set(texts(keep_undesirable=0.5)) <= set(texts())


@pytest.mark.parametrize("count", [2, 4])
def test_pairs_prefer_the_strictly_better(count: int) -> None:
    records = toy_feedback(size=500, feedback="pairs", completions_per_prompt=count)
    assert len(records) == 500
    for record in records:
        rewards = [true_reward(str(record.prompt), completion.text) for completion in record.completions]
        expected = {(i, j) for i in range(count) for j in range(count) if rewards[i] > rewards[j]}
        assert expected
        assert set(record.preferences) == expected
        assert all(completion.desirable is None and completion.score is None for completion in record.completions)


def test_noise_flips_preferences() -> None:
    flipped = 0
    for record in toy_feedback(size=2000, feedback="pairs", noise=0.3):
        ((better, worse),) = record.preferences
        rewards = [true_reward(str(record.prompt), completion.text) for completion in record.completions]
        flipped += rewards[better] < rewards[worse]
    assert_share(flipped, 2000, 0.3)


@pytest.mark.parametrize(
    "knobs",
    [
        {"feedback": "stars"},
        {"noise": -0.1},
        {"noise": 1.1},
        {"noise": math.nan},
        {"keep_desirable": 2.0},
        {"keep_undesirable": -1.0},
        {"completions_per_prompt": 0},
        {"size": 0},
        {"split": "test"},
        {"completions_per_prompt": 1, "feedback": "pairs"},
        {"keep_desirable": 0.5, "feedback": "pairs"},
    ],
)
def test_bad_knobs_are_named(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(knobs))}: expected .* found"):
        toy_feedback(**knobs)
