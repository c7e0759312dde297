"""The toy world as a source: seeded training feedback, and validation that never changes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from halos.data.records.record import Record
from halos.toy.topics_source import TopicsJudge, ToyTopicsSource
from halos.toy.world import is_desirable, prompts_of, true_reward


def source(**knobs: Any) -> ToyTopicsSource:
    return ToyTopicsSource(**{"size": 30, "val_size": 20, **knobs})


def wrong_labels(records: Sequence[Record]) -> int:
    return sum(c.desirable != is_desirable(str(r.prompt), c.text) for r in records for c in r.completions)


def test_the_same_arguments_give_the_same_records_and_another_seed_others() -> None:
    assert source(seed=3).train() == source(seed=3).train()
    assert source(seed=3).train() != source(seed=4).train()


@pytest.mark.parametrize(
    "knobs",
    [{"seed": 4}, {"noise": 0.5}, {"keep_desirable": 0.1}, {"completions_per_prompt": 5}, {"size": 31}],
    ids=str,
)
def test_no_knob_of_the_training_data_changes_validation(knobs: dict[str, Any]) -> None:
    assert source(**knobs).val() == source().val()
    assert source(**knobs).train() != source().train()


def test_sizes_count_prompts_and_splits_share_none() -> None:
    made = source()
    train, val = made.train(), made.val()
    assert (len(train.records), len(val.records)) == (30, 20)
    assert train.dropped == val.dropped == Counter()
    assert {record.prompt for record in train.records} <= set(prompts_of("train"))
    assert {record.prompt for record in val.records} <= set(prompts_of("val"))
    assert not set(prompts_of("train")) & set(prompts_of("val"))


def test_noise_flips_labels_of_training_only() -> None:
    made = source(noise=1.0)
    assert wrong_labels(made.train().records) == 60
    assert wrong_labels(made.val().records) == wrong_labels(source().train().records) == 0


def test_both_splits_have_the_feedback_asked_for() -> None:
    made = source(feedback="pairs")
    for records in (made.train().records, made.val().records):
        assert all(record.preferences for record in records)
        assert all(completion.desirable is None for record in records for completion in record.completions)


@pytest.mark.parametrize(("knob", "kept"), [("keep_desirable", False), ("keep_undesirable", True)])
def test_imbalance_leaves_out_one_side(knob: str, kept: bool) -> None:
    labels = [c.desirable for record in source(**{knob: 0.0}).train().records for c in record.completions]
    assert set(labels) == {kept}


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"noise": 1.5}, "noise: expected a share"),
        ({"keep_desirable": -0.1}, "keep_desirable: expected a share"),
        ({"feedback": "stars"}, "feedback: expected one of labels, pairs; found 'stars'"),
        (
            {"feedback": "pairs", "completions_per_prompt": 1},
            "completions_per_prompt: expected a whole number from 2",
        ),
        ({"feedback": "pairs", "keep_desirable": 0.5}, "keep_desirable: expected 1 with feedback='pairs'"),
        ({"completions_per_prompt": 10**30}, "completions_per_prompt: expected a whole number from 1 to 1000"),
        ({"size": 0}, "size: expected a whole number from 1"),
        ({"val_size": 10**6}, "size: expected 1 to"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        source(**knobs)


def test_the_judge_is_the_true_reward_on_held_out_prompts() -> None:
    judge = source().true_reward()
    assert isinstance(judge, TopicsJudge)
    prompts = judge.prompts(5)
    assert prompts == judge.prompts(9)[:5]
    assert set(prompts) <= set(prompts_of("val"))
    good = "thanks a lot. we will check the payment. best wishes."
    prompt = next(p for p in judge.prompts(100) if "i paid twice." in p)
    for text in (good, good[:-5], "now go away.", ""):
        assert judge.reward(prompt, text) == true_reward(prompt, text)
        assert judge.desirable(prompt, text) == is_desirable(prompt, text)
    assert judge.desirable(prompt, good)
    assert judge.reward(prompt, good) == 1.0
