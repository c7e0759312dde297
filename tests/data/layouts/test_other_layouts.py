"""Layouts of other tools and of people's own making: by themselves, or with nothing but declarations."""

# ruff: noqa: E501 (a row and its record in one line)

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from halos.data.records.record import Completion, Message, Record
from halos.data.sources.feedback_files import FeedbackFiles
from tests.data.layouts.test_layouts import ASKED, PAIR, USER, A, B, Q, chat, read, record, same

GOOD, BAD = Completion(A, True), Completion(B, False)
SCORED = (Completion(A, score=0.9), Completion(B, score=0.1))
TALK = (Message("user", "Hi"), Message("assistant", "Hello"), *USER)
HUMAN = "Human: Hi\n\nAssistant: Hello\n\nHuman: What is two and two?\n\nAssistant: Four."

BY_ITSELF: dict[str, tuple[dict[str, Any], Record]] = {
    "parallel lists, scores": ({"prompt": Q, "responses": [A, B], "scores": [0.9, "0.1"]}, record(Q, SCORED)),
    "parallel lists, ranks": ({"prompt": Q, "responses": [A, B], "ranks": [2, 1]}, record(Q, PAIR, (1, 0))),
    "parallel lists, labels": ({"prompt": Q, "completions": [A, B], "labels": ["up", "down"]}, record(Q, (GOOD, BAD))),
    "accepted and rejected": ({"prompt": Q, "accepted": A, "rejected": B}, record(Q, PAIR, (0, 1))),
    "good and bad": ({"input": Q, "good": A, "bad": B}, record(Q, PAIR, (0, 1))),
    "y_w": ({"prompt": Q, "y_w": A, "y_l": B}, record(Q, PAIR, (0, 1))),
    "a lone word is no pair": ({"prompt": Q, "completion": A, "label": 1, "positive": True}, record(Q, (GOOD,))),
    "developer": ({"messages": [{"role": "developer", "content": "Be brief."}, *chat(Q, A)]}, record(ASKED, (Completion(A),))),
    "a log of OpenAI's": (
        {"request": {"messages": chat(Q)}, "response": {"choices": [{"message": {"role": "assistant", "content": A}}]}, "rating": "thumbs_up"},
        record(USER, (GOOD,)),
    ),
    "a transcript with a label": ({"text": HUMAN, "label": "good"}, record(TALK, (GOOD,))),
    "transcripts of single lines": ({"chosen": f"Human: {Q}\nAssistant: {A}", "rejected": f"Human: {Q}\nAssistant: {B}"}, record(USER, PAIR, (0, 1))),
    "stars": ({"question": Q, "answer": A, "stars": "★★★★☆"}, record(Q, (Completion(A, score=4.0),))),
    "out of five": ({"question": Q, "answer": A, "rating": "4,5 / 5"}, record(Q, (Completion(A, score=4.5),))),
    "a rating in words": ({"question": Q, "answer": A, "rating": "Good"}, record(Q, (GOOD,))),
}  # fmt: skip
DECLARED: dict[str, tuple[dict[str, Any], dict[str, Any], Record]] = {
    "argilla": (
        {"fields": {"prompt": Q, "response": A}, "responses": [{"values": {"rating": {"value": 4}}}]},
        {"columns": {"prompt": "fields.prompt", "completion": "fields.response", "score": "responses.0.values.rating.value"}},
        record(Q, (Completion(A, score=4.0),)),
    ),
    "prodigy, choice": (
        {"text": Q, "options": [{"id": "A", "text": A}, {"id": "B", "text": B}], "accept": ["B"], "answer": "accept"},
        {"columns": {"prompt": "text", "sides": ["options.0.text", "options.1.text"], "winner": "accept.0"}},
        record(Q, PAIR, (1, 0)),
    ),
    "prodigy, binary": (
        {"prompt": Q, "text": A, "answer": "accept"}, {"columns": {"completion": "text", "label": "answer"}}, record(Q, (GOOD,)),
    ),
    "langsmith": (
        {"inputs": {"messages": chat(Q)}, "outputs": {"message": chat("", A)[1]}, "feedback_stats": {"user_score": {"avg": 1.0}}},
        {"columns": {"label": "feedback_stats.user_score.avg"}},
        record(USER, (GOOD,)),
    ),
    "langchain": (
        {"inputs": [{"type": "human", "content": Q}], "outputs": {"type": "ai", "content": A}, "score": 1},
        {"columns": {"prompt": "inputs", "completion": "outputs"}},
        record(USER, (Completion(A, score=1.0),)),
    ),
    "slack": (
        {"thread": [{"user": "U1", "text": Q}, {"user": "bot", "text": A}], "reactions": [{"name": "thumbsup", "count": 2}, {"name": "-1", "count": 1}]},
        {"columns": {"messages": "thread", "votes": "reactions"}, "roles": {"U1": "user"}},
        record(USER, (GOOD,)),
    ),
    "discord": (
        {"messages": [{"author": {"name": "anna"}, "content": Q}, {"author": {"name": "bot"}, "content": A}], "reaction": "👎"},
        {"columns": {"label": "reaction"}, "roles": {"anna": "user"}},
        record(USER, (Completion(A, False),)),
    ),
    "discord, reactions": (
        {"question": Q, "reply": {"content": A, "reactions": [{"emoji": {"name": "👍"}, "count": 3}]}},
        {"columns": {"completion": "reply.content", "votes": "reply.reactions"}},
        record(Q, (GOOD,)),
    ),
    "judgements deep in a list": (
        {"prompt": Q, "candidates": [{"message": {"content": A}, "feedback": {"thumb": "up"}}, {"message": {"content": B}, "feedback": {"thumb": "down"}}]},
        {"columns": {"completions": "candidates", "text": "message.content", "label": "feedback.thumb"}},
        record(Q, (GOOD, BAD)),
    ),
    "messages in a list": (
        {"prompt": Q, "list": [{"m": {"role": "assistant", "content": A}, "s": 0.9}, {"m": {"role": "assistant", "content": B}, "s": 0.1}]},
        {"columns": {"completions": "list", "text": "m", "score": "s"}},
        record(Q, SCORED),
    ),
    "replies by model": (
        {"prompt": Q, "completions": {"gpt": A, "llama": B}, "winner": "llama"}, {"columns": {"sides": ["completions.gpt", "completions.llama"]}}, record(Q, PAIR, (1, 0)),
    ),
    "a winner a side": (
        {"prompt": Q, "left": {"text": A, "won": "yes"}, "right": {"text": B, "won": "no"}},
        {"columns": {"sides": ["left.text", "right.text"], "winner": ["left.won", "right.won"]}},
        record(Q, PAIR, (0, 1)),
    ),
    "the best of n, by its index": ({"prompt": Q, "responses": [A, B], "best": 1}, {"columns": {"winner": "best"}}, record(Q, PAIR, (1, 0))),
    "the best of n, by its text": ({"prompt": Q, "responses": [A, B], "best": A}, {"columns": {"winner": "best"}}, record(Q, PAIR, (0, 1))),
    "a strength": (
        {"prompt": Q, "response_1": A, "response_2": B, "strength": -2},
        {"columns": {"winner": "strength"}, "values": {"first": [-3, -2, -1], "second": [1, 2, 3], "tie": [0]}},
        record(Q, PAIR, (0, 1)),
    ),
    "a first turn": (
        {"conversation_a": chat(Q, A, "Why?", "x"), "conversation_b": chat(Q, B, "How?", "y"), "winner": "model_a"},
        {"columns": {"prompt": "conversation_a.0.content", "sides": ["conversation_a.1.content", "conversation_b.1.content"]}},
        record(Q, PAIR, (0, 1)),
    ),
    "texts of user and assistant": ({"dialog": ["Hi", "Hello", Q, A], "label": 1}, {"columns": {"messages": "dialog"}}, record(TALK, (GOOD,))),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_ITSELF)
def test_by_itself(name: str, tmp_path: Path) -> None:
    row, expected = BY_ITSELF[name]
    (found,), dropped, _ = read(tmp_path, row)
    assert same(found, expected), found
    assert dropped == Counter()


@pytest.mark.parametrize("name", DECLARED)
def test_by_declaration(name: str, tmp_path: Path) -> None:
    row, options, expected = DECLARED[name]
    (found,), dropped, columns = read(tmp_path, row, **options)
    assert same(found, expected), found
    assert dropped == Counter()
    assert sum(not column.endswith(": unused") for column in columns) >= 1


@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        ({"request": {"prompt": Q}, "response": {"text": A}, "feedback": {"thumb": "up"}}, {},
         r"data\.columns\.prompt=request\.prompt data\.columns\.completion=response\.text data\.columns\.label=feedback\.thumb"),
        ({"fields": {"prompt": Q, "response": A}, "responses": [{"values": 3}]}, {}, r"data\.columns\.prompt=fields\.prompt data\.columns\.completion=fields\.response"),
        ({"completion": A, "my question": Q}, {}, r"name it with 'data\.columns\.prompt=my question'"),
        ({"prompt": Q, "responses": [A, B], "best": 1}, {}, r"none for 'best'; name its role, perhaps data\.columns\.winner=best"),
        ({"prompt": Q, "completion": A, "feedback_stats": {"up": 1}}, {}, r"none for 'feedback_stats'; name its role, perhaps data\.columns\.label="),
        ({"prompt": Q, "answer": "accept", "text": A}, {}, r"none for 'text'; name its role, perhaps data\.columns\.completion=text"),
        ({"chosen": HUMAN, "rejected": HUMAN[:-5] + "Five.", "context": "Docs."}, {}, r"none for 'context'"),
        ({"prompt": Q, "responses": [A, B], "scores": [1]}, {}, r"'scores' to be a list with one value for each of the 2 texts in 'responses'"),
        ({"prompt": Q, "responses": [A, B], "best": 2}, {"winner": "best"}, r"'best' to be the index of the best completion, 0 to 1, or its text; found 2"),
        ({"messages": [{"role": "kunde", "content": Q}, *chat("", A)[1:]]}, {}, r"data\.roles\.kunde=user"),
        ({"question": Q, "answer": A, "rating": "meh"}, {}, r"'rating' to be true/false.*data\.values\.desirable"),
        ({"prompt": Q, "completion": A, "label": None}, {}, r"data\.values\.tie=\[''\]. leaves rows without one out"),
    ],
)  # fmt: skip
def test_refusals_name_the_way_out(row: dict[str, Any], columns: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"f\.jsonl:1: expected .*?" + words):
        read(tmp_path, row, columns=columns)


def test_a_declared_role_that_these_rows_do_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data\.columns\.winner: expected a role of rows with completion .*found 'best'"
    ):
        read(tmp_path, {"prompt": Q, "completion": A, "best": "a"}, columns={"winner": "best"})


def test_labels_that_say_nothing_are_left_out_by_name(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": A, "label": label} for n, label in enumerate(("skip", "", None, "good"))]
    records, dropped, _ = read(tmp_path, *rows, values={"tie": ["skip", ""]})
    assert [found.prompt for found in records] == ["q3"]
    assert dropped == {"filtered: rows whose label says nothing (data.values.tie)": 3}


def noted(tmp_path: Path, row: dict[str, Any]) -> dict[str, int]:
    file = tmp_path / "f.jsonl"
    file.write_text(json.dumps(row), encoding="utf-8")
    return dict(FeedbackFiles(file).train().origins[str(file)].noted)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "<p>Two?</p>", "completion": A}, "texts with markup of a chat template or of HTML"),
        ({"prompt": Q, "completion": "<|im_start|>assistant"}, "texts with markup of a chat template or of HTML"),
        ({"prompt": f'["{Q}"]', "completion": A}, "texts that are JSON lists"),
        ({"prompt": Q, "response_a": f"{Q} {A}", "response_b": B, "winner": "a"}, "replies that repeat their prompt"),
        ({"prompt": f"Human: Hi\nHuman: {Q}\nAssistant:", "completion": A}, "prompts that look like a transcript"),
    ],
)
def test_what_looks_odd_is_noted(row: dict[str, Any], what: str, tmp_path: Path) -> None:
    assert noted(tmp_path, row) == {what: 1}
    assert noted(tmp_path, {"prompt": "What is 2 < 3 | 4?", "completion": A}) == {}


def test_columns_of_exports_are_reported(tmp_path: Path) -> None:
    task = {"id": 1, "data": {"prompt": Q, "response": A}, "annotations": [{"result": [{"value": {"rating": 4}}]}]}
    _, _, columns = read(tmp_path, task)
    assert columns["annotations: judgement"] == columns["id: unused"] == columns["response: completion"] == 1
    transcripts = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b", "note": ""}
    _, _, columns = read(tmp_path, transcripts)
    assert columns == {"chosen: chosen": 1, "rejected: rejected": 1, "note: unused": 1}
