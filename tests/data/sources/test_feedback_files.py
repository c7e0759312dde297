"""Each format, with its record written out by hand; what is dropped is counted, what is wrong is an error."""

import copy
import json
from collections import Counter
from typing import Any

import pytest

from halos.data.layouts.layouts import to_record
from halos.data.records.adapted import without_empty
from halos.data.records.record import Completion, Message, Record

Q = {"role": "user", "content": "q"}
S = {"role": "system", "content": "s"}
A = {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}
USER = Message("user", "q")
SYSTEM = Message("system", "s")
PREFERRED = ((0, 1),)
AB = (Completion("a"), Completion("b"))
R, C = ({"role": role, "content": text} for role, text in (("user", "r"), ("assistant", "c")))


def read(row: dict[str, Any]) -> tuple[Record | None, Counter[str]]:
    before, dropped = copy.deepcopy(row), Counter[str]()
    record = to_record("f:3", row, dropped)
    assert row == before, "the row was changed in place"
    return record, dropped


GOLDEN: dict[str, tuple[dict[str, Any], Record]] = {
    "own": (
        {
            "id": "mine",
            "prompt": "q",
            "completions": [{"text": "a", "desirable": "Desirable", "score": 2}, {"text": "b", "desirable": None}],
            "preferences": [[1, 0], [0, 1]],
            "note": "ignored",
        },
        Record("mine", "q", (Completion("a", True, 2.0), Completion("b")), ((1, 0), (0, 1))),
    ),
    "own, messages, no feedback": (
        {"prompt": [S, Q], "completions": [{"text": " a\n"}], "id": None, "preferences": None},
        Record("f:3", (SYSTEM, USER), (Completion(" a\n"),)),
    ),
    "trl preference, text": (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        Record("f:3", "q", AB, PREFERRED),
    ),
    "trl preference, messages": (
        {"prompt": [S, Q], "chosen": [A], "rejected": [B]},
        Record("f:3", (SYSTEM, USER), AB, PREFERRED),
    ),
    "trl preference, implicit prompt": (
        {"chosen": [Q, A, Q, A], "rejected": [Q, A, Q, B]},
        Record("f:3", (USER, Message("assistant", "a"), USER), AB, PREFERRED),
    ),
    "trl preference, prompt null as in parquet": (
        {"prompt": None, "chosen": [Q, A], "rejected": [Q, B]},
        Record("f:3", (USER,), AB, PREFERRED),
    ),
    "trl preference, prompt and one message each": (
        {"prompt": "q", "chosen": [A], "rejected": [B]},
        Record("f:3", "q", AB, PREFERRED),
    ),
    "ultrafeedback": (
        {
            "prompt": "q",
            "chosen": [S, Q, A],
            "rejected": [S, Q, B],
            "messages": [Q, A],
            "score_chosen": 8.5,
            "score_rejected": 3,
        },
        Record("f:3", (SYSTEM, USER), (Completion("a", score=8.5), Completion("b", score=3.0)), PREFERRED),
    ),
    "trl unpaired": (
        {"prompt": "q", "completion": "a", "label": False},
        Record("f:3", "q", (Completion("a", False),)),
    ),
    "trl unpaired, messages": (
        {"prompt": [Q], "completion": [A], "label": 1},
        Record("f:3", (USER,), (Completion("a", True),)),
    ),
    "demonstration": ({"prompt": "q", "completion": "a"}, Record("f:3", "q", (Completion("a"),))),
    "demonstration, called output": ({"prompt": "q", "output": "a"}, Record("f:3", "q", (Completion("a"),))),
    "scored": ({"prompt": "q", "completion": "a", "score": -1}, Record("f:3", "q", (Completion("a", score=-1.0),))),
    "conversation": ({"messages": [S, Q, A]}, Record("f:3", (SYSTEM, USER), (Completion("a"),))),
    "conversation, labelled": (
        {"messages": [Q, A], "label": "undesirable", "score": 0},
        Record("f:3", (USER,), (Completion("a", False, 0.0),)),
    ),
    "halos binary": (
        {"type": "binary_feedback", "prompt_id": 7, "prompt": [Q], "output": [A], "label": 0, "reward": -0.5},
        Record("f:3", (USER,), (Completion("a", False, -0.5),)),
    ),
    "halos binary, text, without type": (
        {"prompt": "q", "output": "a", "label": 1},
        Record("f:3", "q", (Completion("a", True),)),
    ),
    "halos scalar": (
        {"type": "scalar_feedback", "prompt": [Q], "output": [A], "reward": 0.25},
        Record("f:3", (USER,), (Completion("a", score=0.25),)),
    ),
    "halos pairwise, A preferred": (
        {"type": "pairwise_feedback", "prompt": [Q], "output_A": [A], "output_B": [B], "label": 1, "reward_A": 2},
        Record("f:3", (USER,), (Completion("a", score=2.0), Completion("b")), ((0, 1),)),
    ),
    "hh transcripts": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        Record("f:3", (USER,), AB, PREFERRED),
    ),
    "halos pairwise, B preferred": (
        {"prompt": "q", "output_A": "a", "output_B": "b", "label": 0},
        Record("f:3", "q", AB, ((1, 0),)),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_record(name: str) -> None:
    row, expected = GOLDEN[name]
    assert read(row) == (expected, Counter())
    assert read(json.loads(json.dumps(row))) == (expected, Counter())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, "expected 'prompt' with 'completions', .*; found an empty row"),
        ({"topic": "q", "essay": "a"}, "expected 'prompt' with 'completions', .*; found 'topic', 'essay'"),
        ({"prompt": "q"}, "or else 'messages'; found 'prompt'"),
        ({"chosen": "a", "rejected": "b"}, "expected 'prompt' next to 'chosen' and 'rejected', or texts that begin"),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"},
            "name the prompt's column with data.columns.prompt=",
        ),
        ({"chosen": [A], "rejected": [B]}, "expected 'prompt' next to 'chosen' and 'rejected', or texts that"),
        ({"prompt": "q", "chosen": "a"}, "expected the key 'rejected'; found 'prompt', 'chosen'"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "expected 'rejected' to be given; found None"),
        ({"prompt": "q", "chosen": [Q], "rejected": [B]}, r"expected 'chosen\[0\].role' to be assistant"),
        (
            {"prompt": "x", "chosen": [Q, A], "rejected": [Q, B]},
            "expected 'chosen' to be one assistant message, or the",
        ),
        ({"prompt": [S, Q], "chosen": [Q, A], "rejected": [Q, B]}, "expected 'chosen' to be one assistant message"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "eight"},
            "expected 'score_chosen' to be a number",
        ),
        ({"prompt": "q", "completion": "a", "label": "maybe"}, "expected 'label' to be true/false.*; found 'maybe'"),
        ({"prompt": "q", "completion": "a", "label": None}, "expected 'label' to be true/false.*; found None"),
        ({"prompt": " ", "completion": "a"}, "expected 'prompt' to be a prompt that is not empty; found ' '"),
        ({"prompt": [Q, A], "completion": "a"}, "expected the prompt to end with a user, system or tool turn"),
        ({"completion": "a", "label": 1}, "expected the key 'prompt'; found 'completion', 'label'"),
        ({"prompt": "q", "completion": ["a"]}, r"expected 'completion\[0\]' to be a message"),
        ({"prompt": "x", "completion": [Q, A]}, "expected 'completion' to be one assistant message"),
        ({"messages": [A]}, "expected 'messages' to be a prompt and an assistant's turn after it"),
        ({"messages": [Q, A, Q]}, r"expected 'messages\[2\].role' to be assistant"),
        ({"type": "binary_feedback", "prompt": "q", "label": 1}, "expected the key 'output'"),
        ({"type": "binary_feedback", "prompt": "q", "output": "a", "reward": 1}, "expected the key 'label'"),
        ({"type": "pairwise_feedback", "prompt": "q", "output": "a", "label": 1}, "expected the key 'output_A'"),
        (
            {"prompt": "q", "output_A": "a", "output_B": "b", "label": "desirable"},
            r"expected 'label' to be 'output_A' or 'output_B', left/right, a/b or tie; found 'desirable'; name",
        ),
        ({"prompt": "x", "output_A": [A], "output_B": [Q, B], "label": 1}, "expected 'output_B' to be one assistant"),
        ({"prompt": "q", "completions": []}, "expected 'completions' to be a list of objects with 'text'"),
        (
            {"prompt": "q", "completions": [3]},
            r"expected 'completions\[0\]' to be an object .*; found 3",
        ),
        ({"prompt": "q", "completions": [{"text": 3}]}, r"expected 'completions\[0\].text' to be a text; found 3"),
        (
            {"prompt": "q", "completions": [{"text": "a"}, {"text": "b", "desirabel": True}]},
            r"expected 'completions\[1\]' to have 'text' .*, 'desirable', 'score' and 'steps' only; found 'desirabel'",
        ),
        (
            {"prompt": "q", "completions": [{"text": "a", "desirable": "maybe"}]},
            r"expected 'completions\[0\].desirable' to be true/false, 1/0, .* undesirable; found 'maybe'",
        ),
        ({"prompt": "q", "completions": [{"text": "a", "score": float("inf")}]}, "expected a finite score, found inf"),
        ({"prompt": "q", "completions": [{"text": "a"}], "id": 4}, "expected 'id' to be a text; found 4"),
        ({"prompt": "q", "completions": [{"text": "a"}], "id": " "}, "expected 'id' to be a name; found ' '"),
        (
            {"prompt": "q", "completions": [{"text": "a"}], "id": "x", "preferences": [[0, 1]]},
            "expected a preference between two of the 1 completions",
        ),
        (
            {"prompt": "q", "completions": [{"text": "a"}, {"text": "b"}], "preferences": [[0, 1], [True, 0]]},
            r"expected 'preferences\[1\]' to be two indices",
        ),
        ({"prompt": "q", "completions": [{"text": "a"}], "preferences": {}}, "expected 'preferences' to be a list of"),
    ],
)
def test_malformed_row(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        read(row)
    assert str(caught.value).startswith("f:3: ")


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [S, Q, A], "rejected": [Q, B]},
        {"prompt": "q", "chosen": [S, Q, A], "rejected": [B]},
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, A, Q, B]},
        {"chosen": [Q, A, R, C], "rejected": [R, A, R, C]},
    ],
)
def test_a_pair_with_different_prompts_is_dropped_and_counted(row: dict[str, Any]) -> None:
    assert read(row) == (None, Counter({"pair with different prompts": 1}))


@pytest.mark.parametrize(
    ("row", "start", "chosen", "rejected"),
    [
        ({"chosen": [Q, A, R, C], "rejected": [Q, B, R, C]}, [Q], [A, R, C], [B, R, C]),
        ({"chosen": [Q, A, R, C], "rejected": [Q, A, R, B]}, [Q, A, R], [C], [B]),
        ({"chosen": [Q, A, R, C], "rejected": [Q, A, Q, B]}, [Q], [A, R, C], [A, Q, B]),
        ({"chosen": [S, Q, A, R, C], "rejected": [S, Q, B]}, [S, Q], [A, R, C], [B]),
        ({"prompt": [Q], "chosen": [A, R, C], "rejected": [A, R, B]}, [Q, A, R], [C], [B]),
        ({"prompt": [Q], "chosen": [A, R, C], "rejected": "b"}, [Q], [A, R, C], [B]),
        ({"prompt": [Q], "chosen": [Q, A, R, C], "rejected": [Q, B]}, [Q], [A, R, C], [B]),
        (
            {"conversation_a": [Q, A, R, C], "conversation_b": [Q, B, R, A], "winner": "model_a"},
            [Q],
            [A, R, C],
            [B, R, A],
        ),
    ],
)
def test_conversations_that_part_have_their_common_beginning_as_the_prompt(
    row: dict[str, Any], start: Any, chosen: Any, rejected: Any
) -> None:
    record, dropped = read(row)
    assert record is not None
    assert not dropped
    assert record.prompt == tuple(Message(**turn) for turn in start)
    assert record.preferences == ((0, 1),)
    for completion, turns in zip(record.completions, (chosen, rejected), strict=True):
        assert completion == Completion.of(tuple(Message(**turn) for turn in turns))


def test_a_completion_after_its_own_prompt_may_have_several_turns() -> None:
    record, _ = read({"prompt": "q", "completion": [A, R, C], "label": True})
    assert record is not None
    assert record.prompt == "q"
    assert record.completions == (
        Completion.of(tuple(Message(turn["role"], turn["content"]) for turn in (A, R, C)), True),
    )


@pytest.mark.parametrize(
    "row", [{"prompt": "q", "completion": " \n", "label": 1}, {"messages": [Q, {"role": "assistant", "content": ""}]}]
)
def test_an_empty_completion_is_dropped_and_counted(row: dict[str, Any]) -> None:
    assert read(row) == (None, Counter({"empty completion": 1}))


@pytest.mark.parametrize("sides", [{"chosen": "", "rejected": "b"}, {"chosen": "a", "rejected": "\t"}])
def test_half_a_pair_does_not_pass_for_a_demonstration(sides: dict[str, str]) -> None:
    expected = Counter({"empty completion": 1, "completion whose pair has an empty side": 1})
    assert read({"prompt": "q", **sides}) == (None, expected)


def test_preferences_follow_their_completions_when_one_is_dropped() -> None:
    dropped = Counter[str]()
    texts = ["a", "", "c", "d", "e", "f"]
    completions = tuple(Completion(text, desirable=True if text == "e" else None) for text in texts)
    record = Record("f:3", "q", completions, ((0, 1), (2, 0), (1, 3), (4, 1)))
    # c > a stays; d loses its only pair and goes; e loses its pair but keeps its label; f never had feedback.
    assert without_empty(record, dropped) == Record(
        "f:3", "q", (Completion("a"), Completion("c"), Completion("e", True), Completion("f")), ((1, 0),)
    )
    assert dropped == {"empty completion": 1, "completion whose pair has an empty side": 1}


def test_the_worse_side_of_half_a_pair_does_not_pass_for_the_best_score() -> None:
    scores = {"score_chosen": 9.0, "score_rejected": 1.0}
    expected = Counter({"empty completion": 1, "completion whose pair has an empty side": 1})
    assert read({"prompt": "q", "chosen": "", "rejected": "bad", **scores}) == (None, expected)
    better = Record("f:3", "q", (Completion("good", score=9.0),))
    assert read({"prompt": "q", "chosen": "good", "rejected": "", **scores}) == (better, {"empty completion": 1})
    labelled = [{"text": ""}, {"text": "b", "desirable": True, "score": 1.0}]
    record, _ = read({"prompt": "q", "completions": labelled, "preferences": [[0, 1]]})
    assert record == Record("f:3", "q", (Completion("b", True, 1.0),))
