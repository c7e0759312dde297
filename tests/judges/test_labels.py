"""Samples and a judge become feedback: each kind against what the judge said, and what is left out is counted."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from halos.data.layouts.layouts import to_record
from halos.data.records.record import Completion, Conversation, Message, Record
from halos.judges.base import CompletionJudge, PromptCompletion
from halos.judges.labels import label
from halos.judges.truth import TruthJudge
from halos.toy.topics_source import TopicsJudge
from halos.toy.world import is_desirable


class Length(CompletionJudge):
    """Likes long completions; has no answer to "?"."""

    def scores(self, completions: Sequence[PromptCompletion]) -> list[float | None]:
        return [None if text == "?" else float(len(text)) for _, text in completions]


def record(name: str, *texts: str) -> Record:
    return Record(name, f"prompt {name}", tuple(map(Completion, texts)))


RECORDS = [record("a", "xx", "y", "xx", "zz"), record("b", "?", "longest"), record("c", "y")]


def test_marks_follow_the_threshold_or_the_median() -> None:
    rows, counts = label(RECORDS, Length(threshold=2), "binary")
    marks = {c["text"]: c["desirable"] for row in rows for c in row["completions"]}
    assert marks == {"xx": True, "y": False, "zz": True, "longest": True}
    assert counts["repeated completions left out"] == counts["completions without an answer left out"] == 1
    rows, _ = label(RECORDS, Length(), "binary")  # scores 2 1 2 7 1: the median is 2
    assert [c["text"] for row in rows for c in row["completions"] if c["desirable"]] == ["longest"]


def test_pairs_are_those_that_the_judge_tells_apart() -> None:
    rows, counts = label(RECORDS, Length(), "pairs")
    (row,) = rows
    found = [(row["completions"][i]["text"], row["completions"][j]["text"]) for i, j in row["preferences"]]
    assert sorted(found) == [("xx", "y"), ("zz", "y")]
    assert counts["ties left out"] == 1
    assert counts["duels without an answer left out"] == 1
    assert counts["prompts without a pair left out"] == 2


def test_scores_are_the_judges_own() -> None:
    rows, _ = label(RECORDS, Length(), "scores")
    assert [c["score"] for c in rows[0]["completions"]] == [2.0, 1.0, 2.0]


def test_the_true_reward_marks_as_the_world_does() -> None:
    prompt, good = "i bought a lamp on monday. i paid twice.", "thanks a lot. we will check the payment. best wishes."
    rows, _ = label([Record("1", prompt, (Completion(good), Completion("hm.")))], TruthJudge(TopicsJudge()), "binary")
    assert [c["desirable"] for c in rows[0]["completions"]] == [True, False]
    assert is_desirable(prompt, good)


def test_nothing_left_and_unknown_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected feedback on at least one completion"):
        label([record("a", "?")], Length(), "binary")
    with pytest.raises(ValueError, match="feedback: expected one of binary, pairs, scores"):
        label(RECORDS, Length(), "ranks")
    with pytest.raises(ValueError, match="judge=truth: expected data whose true reward is known"):
        TruthJudge(None)


def test_replies_with_turns_keep_them_and_their_prompt_its_tools() -> None:
    call = Message("assistant", "", '{"tool_calls": [{"name": "f"}]}')
    prompt = Conversation((Message("user", "q"),), '[{"name": "f"}]')
    record = Record("a", prompt, (Completion.of((call,)), Completion("no"), Completion.of((call,))))
    for kind, count in (("binary", 2), ("pairs", 2), ("scores", 2)):
        rows, _ = label([record], Calls(), kind)
        (again,) = (to_record("f:1", row, Counter()) for row in rows)
        assert again is not None
        assert again.prompt == prompt
        assert [completion.turns for completion in again.completions] == [(call,), ()]
        assert len(again.completions) == count


class Calls(CompletionJudge):
    """Likes calls of tools."""

    def scores(self, completions: Sequence[PromptCompletion]) -> list[float | None]:
        return [float(isinstance(reply, tuple)) for _, reply in completions]


@pytest.mark.parametrize("kind", ["binary", "scores", "pairs"])
def test_judged_records_keep_their_weight(kind: str) -> None:
    rows, _ = label([replace(record("a", "x", "xx"), weight=2.5)], Length(), kind)
    assert [row["weight"] for row in rows] == [2.5]
