"""The toy world as a source of feedback: every kind of it from one person, and validation that never changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halos.data.records.record import Record
from halos.toy import Annotator, ToySource, world
from halos.toy.people import is_good
from tests.train_runs import run

REFUND = "i bought a lamp on monday. please refund me."
SURE = Annotator(noise=0.0, expectation=0.65, curvature=1.0, loss_aversion=2.0)


def source(**knobs: Any) -> ToySource:
    return ToySource(**{"size": 40, "val_size": 20, **knobs})


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


@pytest.mark.parametrize("knobs", [{"completions_per_prompt": 5}, {"writer": "beginner"}, {"size": 31}], ids=str)
def test_no_knob_of_the_training_data_changes_validation(knobs: dict[str, Any]) -> None:
    assert source(**knobs).val() == source().val()
    assert source(**knobs).train() != source().train()


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
        ({"completions_per_prompt": 10**30}, "completions_per_prompt"),
        ({"voters": 0}, "voters"),
        ({"voters": 10**30}, "voters"),
        ({"writer": "boss"}, "writer"),
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


def test_a_beginner_is_liked_less_than_the_staff() -> None:
    liked = {}
    for writer in ("beginner", "staff"):
        records = source(writer=writer, size=300).train().records
        liked[writer] = sum(bool(one.desirable) for record in records for one in record.completions)
    assert 2 * liked["beginner"] < liked["staff"]


@pytest.mark.runs
@pytest.mark.parametrize(
    "words",
    [
        ("loss=kto", "sampling.size=4", "data.source.annotator.loss_aversion=1.5"),
        pytest.param(("loss=dpo", "sampling.size=4", "data.source.feedback=pairs"), marks=pytest.mark.slow),
        pytest.param(("loss=ppo", "sampling.size=4", "data.source.feedback=stars"), marks=pytest.mark.slow),
    ],
)
def test_a_run_on_its_feedback(words: tuple[str, ...], tmp_path: Path) -> None:
    summary = run(tmp_path, *words)
    assert summary["steps"] > 0
    assert 0 <= summary["samples"]["policy_desirable"] <= 1
