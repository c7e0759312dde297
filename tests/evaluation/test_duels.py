"""Duels: ties count half, unanswered duels are left out, and the data's own completions are those that people liked."""

from collections.abc import Sequence

import pytest

from halos.data.records.record import Completion, Record
from halos.evaluation.duels import best_of_data, win_rate
from halos.evaluation.statistics import Bootstrap
from halos.judges.base import CompletionJudge, PromptCompletion


class Length(CompletionJudge):
    """Likes long completions; has no answer to "?"."""

    def scores(self, completions: Sequence[PromptCompletion]) -> list[float | None]:
        return [None if text == "?" else float(len(text)) for _, text in completions]


def test_win_rates_count_ties_half_and_leave_out_what_has_no_answer() -> None:
    prompts = [f"p{n}" for n in range(12)]
    ours = [["long"]] * 8 + [["same"], ["x"], ["?"], ["x"]]
    theirs = [["s"]] * 8 + [["ties"], ["longer"], ["a"], ["longer"]]
    found = win_rate(Length(), prompts, ours, theirs, Bootstrap(resamples=200))
    assert found.rate.value == pytest.approx((8 + 0.5) / 11)
    shown = found.as_json()
    assert [shown[name] for name in ("won", "tied", "lost", "without an answer")] == [8, 1, 2, 1]
    # Ten duels that are no tie, eight won: 2 · (45 + 10 + 1) / 2^10 by the binomial distribution.
    assert found.p_value == pytest.approx(2 * 56 / 1024)


def test_a_side_with_fewer_completions_is_counted_round() -> None:
    found = win_rate(Length(), ["p", "q"], [["aaa", "a"], ["aaa", "a"]], [["bb"], ["bb"]], Bootstrap(resamples=20))
    assert found.verdicts == [1.0, 0.0, 1.0, 0.0]
    assert found.p_value == 1.0


def test_the_datas_own_completions_are_those_that_people_liked() -> None:
    pair = Record("1", "p", (Completion("bad"), Completion("good")), ((1, 0),))
    marked = Record("2", "q", (Completion("no", False), Completion("yes", True)))
    assert list(best_of_data([pair, marked]).values()) == [["good"], ["yes"]]
