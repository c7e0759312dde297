"""The value function of people is recovered from their answers, with intervals that mean what they say."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy import optimize

from halos.evaluation.answers import NAMES, Answers
from halos.evaluation.value_fit import ValueFit, fit_value
from halos.toy import Annotator, ToySource
from halos.toy.people import MEAN_WORDS, utility

TRUE = {"expectation": 0.5, "curvature": 0.88, "loss_aversion": 2.25, "noise": 0.3, "length_bias": 0.03}


def toy_answers(person: Annotator, *, size: int, feedback: str = "labels") -> tuple[Answers, dict[str, float]]:
    """Answers of a person of the toy world with the true utilities, and the person's parameters as they are fitted."""
    source = ToySource(size=size, val_size=1, feedback=feedback, annotator=person)
    replies: list[tuple[float, int]] = []
    labels: list[tuple[int, bool]] = []
    pairs: list[tuple[int, int]] = []
    for record in source.train().records:
        pairs += [(len(replies) + better, len(replies) + worse) for better, worse in record.preferences]
        for reply in record.completions:
            labels += [] if reply.desirable is None else [(len(replies), reply.desirable)]
            replies.append((utility(record.prompt, reply.text), len(re.findall(r"\w+", reply.text))))
    scores, lengths = np.array(replies, dtype=float).T
    judged, desirable = (np.array(column) for column in zip(*labels, strict=True)) if labels else ([], [])
    answers = Answers(
        scores,
        lengths,
        np.array(judged, dtype=np.int64),
        np.array(desirable, dtype=np.bool_),
        np.array(pairs, dtype=np.int64).reshape(-1, 2),
    )
    true = {name: getattr(person, name) for name in NAMES}
    # The annotator counts words from MEAN_WORDS on, the fit from the mean of the data.
    true["expectation"] -= person.length_bias * (lengths.mean() - MEAN_WORDS)
    return answers, true


def drawn_answers(seed: int, count: int) -> Answers:
    """Labels of a person with the parameters TRUE, on replies whose scores all differ, as those of a model do."""
    rng = np.random.default_rng(seed)
    scores, lengths = rng.normal(0.5, 0.5, count), rng.integers(4, 17, count).astype(float)
    gains = scores + TRUE["length_bias"] * (lengths - lengths.mean()) - TRUE["expectation"]
    sizes = np.abs(gains) ** TRUE["curvature"]
    values = np.where(gains >= 0, sizes, -TRUE["loss_aversion"] * sizes)
    desirable = values + rng.logistic(scale=TRUE["noise"], size=count) >= 0
    return Answers(scores, lengths, np.arange(count), desirable)


def holds(fit: ValueFit, name: str, true: float) -> bool:
    """Whether the interval of a parameter holds the true value."""
    low, high = fit.estimates[name].low, fit.estimates[name].high
    return (low is None or low <= true) and (high is None or true <= high)


@pytest.mark.long
def test_the_annotator_of_the_toy_world_is_recovered_from_labels() -> None:
    answers, true = toy_answers(Annotator(noise=0.3, length_bias=0.03), size=2000)
    fit = fit_value(answers)
    assert all(fit.is_determined(name) for name in NAMES)
    assert [name for name in NAMES if not holds(fit, name, true[name])] == []
    assert fit.estimates["expectation"].value == pytest.approx(true["expectation"], abs=0.05)
    assert fit.estimates["loss_aversion"].value == pytest.approx(2.25, abs=1)
    assert fit.estimates["length_bias"].value == pytest.approx(0.03, abs=0.015)
    assert fit.p_linear < 1e-4


@pytest.mark.long
def test_pairs_determine_the_length_bias_but_not_the_expectation() -> None:
    answers, true = toy_answers(Annotator(noise=0.3, length_bias=0.03), size=300, feedback="pairs")
    fit = fit_value(answers, {"curvature": 0.88})
    assert fit.is_determined("length_bias")
    assert holds(fit, "length_bias", true["length_bias"])
    assert not fit.is_determined("loss_aversion")


def test_answers_without_losses_leave_loss_aversion_open() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(1.0, 2.0, 200)
    answers = Answers(scores, np.ones(200), np.arange(200), scores - 0.5 + rng.logistic(size=200) >= 0)
    fit = fit_value(answers, {"expectation": 0.5, "curvature": 1.0})
    assert not fit.is_determined("loss_aversion")
    assert fit.is_determined("noise")
    assert fit.fixed == {"expectation": 0.5, "curvature": 1.0, "length_bias": 0.0}
    assert fit.p_linear is None


def test_estimate_and_interval_are_those_of_a_likelihood_in_one_parameter_by_hand() -> None:
    given = {"expectation": 0.5, "curvature": 1.0, "loss_aversion": 1.0, "length_bias": 0.0}
    answers = drawn_answers(0, 150)
    odds = [(x - 0.5) * (1 if good else -1) for x, good in zip(answers.scores, answers.desirable, strict=True)]

    def loss(noise: float) -> float:
        return sum(math.log1p(math.exp(-one / noise)) for one in odds)

    best = optimize.minimize_scalar(loss, bounds=(0.05, 2), method="bounded", options={"xatol": 1e-8}).x
    ends = [
        optimize.brentq(lambda s: loss(s) - loss(best) - 3.841458820694124 / 2, *sorted((best, far)))
        for far in (0.05, 2)
    ]
    found = fit_value(answers, given).estimates["noise"]
    assert found.value == pytest.approx(best, rel=1e-4)
    assert [found.low, found.high] == pytest.approx(ends, rel=0.005)
    assert found.n == 150


def test_another_unit_of_the_scores_changes_neither_curvature_nor_loss_aversion() -> None:
    one = drawn_answers(1, 300)
    other = Answers(one.scores * 40 + 7, one.lengths, one.labelled, one.desirable)
    fits = [fit_value(answers) for answers in (one, other)]
    for name in ("curvature", "loss_aversion"):
        first, second = (fit.estimates[name] for fit in fits)
        assert (first.value, first.low, first.high) == pytest.approx((second.value, second.low, second.high), rel=0.03)
    expectation, moved = (fit.estimates["expectation"].value for fit in fits)
    assert moved == pytest.approx(expectation * 40 + 7, abs=0.4)
    assert fits[0].share_wrong == pytest.approx(fits[1].share_wrong, abs=1e-3)


def test_the_share_of_answers_against_the_value_is_found() -> None:
    answers = drawn_answers(2, 1000)
    gains = answers.scores + 0.03 * (answers.lengths - answers.lengths.mean()) - 0.5
    share = np.mean((gains >= 0) != answers.desirable)
    given = {name: TRUE[name] for name in NAMES if name != "noise"}
    assert fit_value(answers, given).share_wrong == pytest.approx(share, abs=0.04)


@pytest.mark.slow
def test_the_intervals_hold_the_truth_as_often_as_they_say() -> None:
    runs = 60
    fits = [fit_value(drawn_answers(seed, 800)) for seed in range(runs)]
    for name in NAMES:
        covered = sum(holds(fit, name, TRUE[name]) for fit in fits)
        # With a coverage of 95 % fewer than 52 of 60 have a probability of 0.3 %.
        assert covered >= 52, (name, covered)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"beta": 1.0}, "fix: expected one of expectation, curvature, loss_aversion, noise, length_bias; found 'beta'"),
        ({"noise": 0.0}, "fix.noise: expected a number above 0, found 0.0"),
        ({"curvature": "much"}, "fix.curvature: expected a number above 0, found 'much'"),
        ({"expectation": math.inf}, "fix.expectation: expected a number, found inf"),
        (TRUE, "fix: expected a parameter to estimate, found values for all of them"),
    ],
)
def test_values_that_cannot_be_given_are_refused(fixed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        fit_value(drawn_answers(0, 20), fixed)
