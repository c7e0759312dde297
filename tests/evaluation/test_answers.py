"""The likelihood of labels and pairs under a value function."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from halos.evaluation.answers import NAMES, Answers, Likelihood
from halos.toy import Annotator

SCORES = np.array([0.9, -0.4, 0.2, 0.65, -1.3])
LENGTHS = np.array([4.0, 9.0, 12.0, 5.0, 10.0])
LABELS = [(0, True), (1, False), (2, True), (1, True)]
PAIRS = [(0, 1), (2, 3), (4, 3)]
PARAMETERS = {"expectation": 0.3, "curvature": 0.7, "loss_aversion": 1.9, "noise": 0.4, "length_bias": 0.05}


def answers(labels: list[tuple[int, bool]], pairs: list[tuple[int, int]], scores: np.ndarray = SCORES) -> Answers:
    return Answers(
        scores,
        LENGTHS,
        np.array([reply for reply, _ in labels], dtype=np.int64),
        np.array([good for _, good in labels], dtype=np.bool_),
        np.array(pairs, dtype=np.int64).reshape(-1, 2),
    )


def point(likelihood: Likelihood, parameters: dict[str, float]) -> np.ndarray:
    return np.array([likelihood.point(name, parameters[name]) for name in NAMES])


def by_hand(labels: list[tuple[int, bool]], pairs: list[tuple[int, int]]) -> float:
    """The log-likelihood in plain Python."""
    judged = {reply for reply, _ in labels} | {reply for pair in pairs for reply in pair}
    mean = sum(LENGTHS[reply] for reply in judged) / len(judged)

    def value(reply: int) -> float:
        gain = SCORES[reply] + 0.05 * (LENGTHS[reply] - mean) - 0.3
        return gain**0.7 if gain >= 0 else -1.9 * (-gain) ** 0.7

    odds = [value(reply) if good else -value(reply) for reply, good in labels]
    odds += [value(better) - value(worse) for better, worse in pairs]
    return -sum(math.log1p(math.exp(-one / 0.4)) for one in odds)


@pytest.mark.parametrize(("labels", "pairs"), [(LABELS, []), ([], PAIRS), (LABELS, PAIRS), (LABELS[:2], PAIRS[:1])])
def test_the_likelihood_is_that_of_each_answer_by_hand(
    labels: list[tuple[int, bool]], pairs: list[tuple[int, int]]
) -> None:
    likelihood = Likelihood(answers(labels, pairs))
    assert -likelihood(point(likelihood, PARAMETERS))[0] == pytest.approx(by_hand(labels, pairs), rel=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    likelihood = Likelihood(answers(LABELS, PAIRS))
    at, step = point(likelihood, PARAMETERS), 1e-6
    for place, slope in enumerate(likelihood(at)[1]):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        assert slope == pytest.approx((likelihood(up)[0] - likelihood(down)[0]) / (2 * step), rel=1e-6), NAMES[place]


def test_a_label_has_the_odds_of_the_toy_worlds_annotator() -> None:
    person = Annotator(expectation=0.3, curvature=0.7, loss_aversion=1.9, noise=0.4)
    prompt = "i bought a lamp on monday. where is my parcel?"
    # The scores 0 and 1 are their utilities (docs/results/toy-world.md).
    for place, reply in enumerate(("thanks a lot. we will check the parcel.", "stop whining. hm.")):
        liked, disliked = (Likelihood(answers([(place, good), (2, True), (2, False)], [])) for good in (True, False))
        at = point(liked, PARAMETERS | {"length_bias": 0.0})
        assert disliked(at)[0] - liked(at)[0] == pytest.approx(person.value(prompt, reply) / 0.4, rel=1e-12)


def test_parameters_come_back_from_a_point() -> None:
    likelihood = Likelihood(answers(LABELS, PAIRS))
    assert likelihood.parameters(point(likelihood, PARAMETERS)) == pytest.approx(PARAMETERS, rel=1e-12)


@pytest.mark.parametrize(
    ("labels", "pairs", "scores", "message"),
    [
        ([], [], SCORES, "data: expected labels or pairs, found none"),
        (
            [(0, True), (1, True)],
            [],
            SCORES,
            "data: expected desirable and undesirable replies, found 2, all of them d",
        ),
        (
            [(0, False), (1, False), (2, False)],
            [],
            SCORES,
            "data: expected desirable and undesirable replies, found 3, all of them undesirable",
        ),
        (LABELS, [], SCORES * np.nan, "scores: expected a finite score of each judged reply, found 3 others"),
        (LABELS, PAIRS, SCORES * 0, "scores: expected scores that differ, found 0 for all 5"),
    ],
)
def test_answers_that_determine_nothing_are_refused(
    labels: list[tuple[int, bool]], pairs: list[tuple[int, int]], scores: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        answers(labels, pairs, scores)
