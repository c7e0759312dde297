"""Metrics of held-out feedback against values computed by hand."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from halos.data.records.record import Completion, Conversation, Message, Record, prompt_key
from halos.data.views.selection import Selection
from halos.evaluation.calibration import calibration_error, reliability
from halos.evaluation.duels import best_of_data
from halos.evaluation.heldout import answered, feedback_metrics, held_out, likelihood_metrics
from halos.evaluation.statistics import Bootstrap
from halos.sampling.scoring import Scores

RECORDS = [
    Record("1", "p", (Completion("aa"), Completion("b")), ((0, 1),)),
    Record("2", "q", (Completion("c"), Completion("dd")), ((1, 0),)),
    Record("3", "q", (Completion("c"), Completion("e")), ((1, 0),)),
]
REWARDS, TOKENS = np.array([2.0, 1.0, 0.5, 0.0, 0.5]), np.array([3.0, 2.0, 4.0, 2.0, 4.0])


def test_each_completion_stands_once_and_pairs_and_labels_point_to_it() -> None:
    data = held_out(RECORDS)
    assert [f"{data.completions[a]}>{data.completions[b]}" for a, b in data.pairs] == ["aa>b", "dd>c", "e>c"]
    assert sorted(data.completions) == ["aa", "b", "c", "dd", "e"]
    assert len(set(data.groups)) == 2
    assert len(data.labels) == 6  # c is undesirable in two records


def test_replies_with_turns_are_held_out_whole() -> None:
    call = (Message("assistant", "", '{"tool_calls": [{"name": "f"}]}'),)
    prompt = Conversation((Message("user", "q"),), '[{"name": "f"}]')
    records = [
        Record("1", prompt, (Completion.of(call), Completion(call[0].text)), ((0, 1),)),
        Record("2", "q", (Completion("c"),)),
    ]
    data = held_out(records)
    assert (data.prompts, data.completions) == ([prompt, prompt], [call, call[0].text])
    assert best_of_data(records) == {prompt_key(prompt): [call], prompt_key("q"): ["c"]}


def test_metrics_have_the_values_computed_by_hand() -> None:
    data = held_out(RECORDS)
    by_text = dict(zip(("aa", "b", "dd", "c", "e"), zip(REWARDS, TOKENS, strict=True), strict=True))
    rewards, tokens = (np.array([by_text[str(text)][i] for text in data.completions]) for i in (0, 1))
    found = {
        name: estimate.value
        for name, estimate in feedback_metrics(data, rewards, tokens, Bootstrap(resamples=10)).items()
    }
    assert found["rewards/accuracies"] == 1.0
    assert found["rewards/margins"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert found["rewards/chosen"] == pytest.approx((2 + 0.5 + 0.5) / 3)
    assert found["rewards/rejected"] == pytest.approx((1 + 0 + 0) / 3)
    assert found["rewards/auc"] == pytest.approx((3 + 2 + 2) / 9)
    assert found["length/chosen_longer"] == 1.0
    r, n = [2, 1, 0.5, 0, 0.5, 0], [3, 2, 4, 2, 4, 2]
    assert found["length/reward_correlation"] == pytest.approx(np.corrcoef(r, n)[0, 1])


def test_equal_rewards_are_right_half_of_the_time() -> None:
    found = feedback_metrics(held_out(RECORDS), np.zeros(5), TOKENS, Bootstrap(resamples=10))
    assert found["rewards/accuracies"].value == found["rewards/auc"].value == 0.5


def test_perplexity_is_that_of_liked_completions() -> None:
    data = held_out(RECORDS)
    logps = np.array([-float(len(text)) for text in data.completions])
    nothing = np.full(5, math.nan)
    scores = Scores(logps, nothing, -logps, nothing, np.full(5, 2.0))
    found = likelihood_metrics(data, scores, Bootstrap(resamples=10))
    assert found["data/perplexity"].value == pytest.approx(math.exp((2 + 2 + 1) / 6))
    assert set(found) == {"data/perplexity", "data/entropy_per_token"}


def test_pairs_from_scores_are_those_of_the_selection() -> None:
    scored = [Record("1", "p", tuple(Completion(text, score=n) for n, text in enumerate("abc")))]
    assert len(held_out(scored).pairs) == 1
    assert len(held_out(scored, Selection(pairs_from_scores="all")).pairs) == 3


def test_records_without_feedback_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to learn from"):
        held_out([Record("1", "p", (Completion("a"),))])


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    margins = np.random.default_rng(0).normal(0.5, 2, size=500)
    confidence = torch.sigmoid(torch.tensor(np.abs(margins)))
    right = torch.tensor(margins > 0).long()
    # 20 bins of [0, 1] are 10 of [0.5, 1].
    expected = float(binary_calibration_error(confidence, right, n_bins=20, norm="l1"))
    assert calibration_error(margins) == pytest.approx(expected, abs=1e-6)
    assert reliability(margins)[2].sum() == 500


def test_a_calibrated_policy_has_a_small_error_and_an_overconfident_one_a_large() -> None:
    random = np.random.default_rng(1)
    truth = random.normal(0, 1.5, size=20000)
    margins = np.where(random.random(20000) < 1 / (1 + np.exp(-truth)), truth, -truth)
    assert calibration_error(margins) < 0.02
    assert calibration_error(5 * margins) > 0.1


def test_answers_are_listed_as_they_were_given() -> None:
    labelled = Record("a", "q", (Completion("x", desirable=True), Completion("y", desirable=False)))
    paired = Record("b", "q", (Completion("x"), Completion("z"), Completion("w", score=3.0)), ((1, 0),))
    held = answered([labelled, paired], Selection(), [])
    assert held.completions == ["z", "x", "y"]
    assert (held.pairs, held.labels) == ([(0, 1)], [(1, True), (2, False)])
    scored = answered([labelled, paired], Selection(labels_from_scores=1.0), [])
    assert scored.completions == ["z", "x", "y", "w"]
    assert scored.labels == [(1, True), (2, False), (3, True)]
