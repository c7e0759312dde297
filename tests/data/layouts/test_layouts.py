"""Layouts of feedback: each row, with its record written out by hand; what would be lost is refused."""

# ruff: noqa: E501 (a row and its record in one line)

import csv
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from halos.data.records.record import Completion, Message, Record, messages_of
from halos.data.sources.feedback_files import FeedbackFiles

SHARED = Path(__file__).parents[4] / "shared/data/feedback-formats"
Q, A, B = "What is two and two?", "Four.", "Five."
PAIR = (Completion(A), Completion(B))
SYSTEM = Message("system", "Be brief.")
ASKED = (SYSTEM, Message("user", Q))


def chat(
    *turns: str, keys: tuple[str, str] = ("role", "content"), names: tuple[str, str] = ("user", "assistant")
) -> list[dict[str, str]]:
    return [{keys[0]: names[n % 2], keys[1]: turn} for n, turn in enumerate(turns)]


def gpt(*turns: str) -> list[dict[str, str]]:
    return chat(*turns, keys=("from", "value"), names=("human", "gpt"))


def record(prompt: Any, completions: tuple[Completion, ...], *preferences: tuple[int, int]) -> Record:
    return Record("", prompt, completions, preferences)


USER = (Message("user", Q),)
BY_ITSELF: dict[str, tuple[dict[str, Any], Record]] = {
    "alpaca": ({"instruction": "Answer.", "input": Q, "output": A}, record(f"Answer.\n{Q}", (Completion(A),))),
    "alpaca, empty input": ({"instruction": Q, "input": "", "output": A}, record(Q, (Completion(A),))),
    "alpaca, history and system": (
        {"instruction": Q, "output": A, "system": "Be brief.", "history": [["Hello", "Hi"]]},
        record((SYSTEM, Message("user", "Hello"), Message("assistant", "Hi"), *USER), (Completion(A),)),
    ),
    "alpaca ranking": ({"instruction": Q, "output": [A, B, "?"]}, record(Q, (*PAIR, Completion("?")), (0, 1), (0, 2), (1, 2))),
    "alpaca pairs": ({"instruction": "Answer.", "input": Q, "chosen": A, "rejected": B}, record(f"Answer.\n{Q}", PAIR, (0, 1))),
    "sharegpt": ({"conversations": [{"from": "system", "value": "Be brief."}, *gpt(Q, A)]}, record(ASKED, (Completion(A),))),
    "sharegpt with roles": ({"conversations": chat(Q, A)}, record(USER, (Completion(A),))),
    "sharegpt labels": ({"conversations": gpt(Q, A), "kto_tag": False}, record(USER, (Completion(A, False),))),
    "sharegpt pairs": (
        {"conversations": gpt(Q), "chosen": {"from": "gpt", "value": A}, "rejected": {"from": "gpt", "value": B}},
        record(USER, PAIR, (0, 1)),
    ),
    "openai": (
        {
            "input": {"messages": [{"role": "system", "content": "Be brief."}, *chat(Q)]},
            "preferred_output": [{"role": "assistant", "content": A}],
            "non_preferred_output": [{"role": "assistant", "content": B}],
        },
        record(ASKED, PAIR, (0, 1)),
    ),
    "messages next to objects": (
        {"messages": chat(Q), "chosen": {"role": "assistant", "content": A}, "rejected": {"role": "assistant", "content": B}},
        record(USER, PAIR, (0, 1)),
    ),
    "messages next to texts": ({"messages": chat(Q), "chosen": A, "rejected": B}, record(USER, PAIR, (0, 1))),
    "orca": ({"system": "Be brief.", "question": Q, "chosen": A, "rejected": B}, record(ASKED, PAIR, (0, 1))),
    "chosen_response": ({"instruction": Q, "chosen_response": A, "rejected_response": B}, record(Q, PAIR, (0, 1))),
    "implicit prompt": ({"chosen": f"{Q} {A}", "rejected": f"{Q} {B}"}, record(Q, PAIR, (0, 1))),
    "transcripts": (
        {"prompt": f"\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: {Q}\n\nAssistant:", "chosen": f" {A}", "rejected": f" {B}"},
        record((Message("user", "Hello"), Message("assistant", "Hi"), *USER), PAIR, (0, 1)),
    ),
    "arena": (
        {"conversation_a": chat(Q, A), "conversation_b": chat(Q, B), "winner": "model_b", "model_a": "x", "model_b": "y"},
        record(USER, PAIR, (1, 0)),
    ),
    "a column a winner": (
        {"prompt": Q, "response_a": A, "response_b": B, "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        record(Q, PAIR, (0, 1)),
    ),
    "pku": ({"prompt": Q, "response_0": A, "response_1": B, "better_response_id": 0, "safer_response_id": 1}, record(Q, PAIR, (0, 1))),
    "alpaca eval": ({"instruction": Q, "output_1": A, "output_2": B, "preference": 2.0}, record(Q, PAIR, (1, 0))),
    "ranked answers": (
        {"prompt": Q, "answers": [{"answer": B, "rank": 2.0, "model": "x"}, {"answer": A, "rank": 1.0, "model": "y"}]},
        record(Q, (Completion(B), Completion(A)), (1, 0)),
    ),
    "webgpt": (
        {"question": {"full_text": Q, "id": "1"}, "answer_0": A, "score_0": 0.5, "answer_1": B, "score_1": -0.5},
        record(Q, (Completion(A, score=0.5), Completion(B, score=-0.5))),
    ),
    "label studio, pairwise": (
        {"data": {"prompt": Q, "answer1": A, "answer2": B}, "annotations": [{"result": [{"value": {"selected": "right"}}]}]},
        record(Q, PAIR, (1, 0)),
    ),
    "label studio, rating": (
        {"data": {"prompt": Q, "response": A}, "annotations": [{"result": [{"value": {"rating": n}}]} for n in (4, 5)]},
        record(Q, (Completion(A, score=4.5),)),
    ),
    "open webui": (
        {
            "data": {"rating": -1},
            "meta": {"message_id": "a"},
            "snapshot": {"chat": {"chat": {"history": {"messages": {
                "q": {"parentId": None, "role": "user", "content": Q},
                "a": {"parentId": "q", "role": "assistant", "content": A},
                "b": {"parentId": "q", "role": "assistant", "content": B},
            }}}}},
        },
        record(USER, (Completion(A, False),)),
    ),
    "nested replies": (
        {"prompt": {"text": Q, "role": "prompter", "replies": [
            {"text": B, "role": "assistant", "rank": 1, "replies": []}, {"text": A, "role": "assistant", "rank": 0, "replies": []},
        ]}},
        record(USER, (Completion(B), Completion(A)), (1, 0)),
    ),
    "votes": ({"prompt": Q, "completion": A, "votes": {"up": 1, "down": 3}}, record(Q, (Completion(A, False),))),
    "columns of votes": ({"prompt": Q, "completion": A, "upvotes": "3", "downvotes": ""}, record(Q, (Completion(A, True),))),
    "label studio, choices": (
        {
            "data": {"prompt": Q, "response": A},
            "annotations": [{"result": [{"value": {"choices": [word]}}]} for word in ("bad", "good", "bad")],
        },
        record(Q, (Completion(A, False),)),
    ),
    "a spreadsheet": ({"User input": Q, "Response": A, "Feedback": "👍"}, record(Q, (Completion(A, True),))),
}  # fmt: skip


def read(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> tuple[list[Record], Counter[str], Counter[str]]:
    file = tmp_path / "f.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    records = FeedbackFiles(str(file), **options).train()
    (origin,) = records.origins.values()
    return list(records.records), records.dropped, origin.columns


def same(found: Record, expected: Record) -> bool:
    return (found.prompt, found.completions, found.preferences) == (
        expected.prompt,
        expected.completions,
        expected.preferences,
    )


@pytest.mark.parametrize("name", BY_ITSELF)
def test_a_layout_is_recognised_by_itself(name: str, tmp_path: Path) -> None:
    row, expected = BY_ITSELF[name]
    (found,), dropped, _ = read(tmp_path, row)
    assert same(found, expected), found
    assert dropped == Counter()


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ({"prompt": "ask.text", "completion": "replies.0.body", "label": "replies.0.ok"},
         {"ask": {"text": Q}, "replies": [{"body": A, "ok": "yes"}]}, record(Q, (Completion(A, True),))),
        ({"prompt": "q", "sides": ["one", "two"], "winner": "best"}, {"q": Q, "one": A, "two": B, "best": "two"}, record(Q, PAIR, (1, 0))),
        ({"prompt": "q", "sides": ["one", "two"], "winner": ["won1", "won2"]},
         {"q": Q, "one": A, "two": B, "won1": False, "won2": True}, record(Q, PAIR, (1, 0))),
        ({"prompt": "q", "sides": ["one", "two"], "scores": ["s1", "s2"]},
         {"q": Q, "one": A, "two": B, "s1": "3", "s2": 1}, record(Q, (Completion(A, score=3.0), Completion(B, score=1.0)))),
        ({"prompt": "q", "completions": "list", "text": "body", "rank": "place"},
         {"q": Q, "list": [{"body": A, "place": 1}, {"body": B, "place": 2}]}, record(Q, PAIR, (0, 1))),
        ({"input": "context"}, {"prompt": Q, "context": "Docs.", "completion": A}, record(f"{Q}\nDocs.", (Completion(A),))),
        ({"ignore": ["context"]}, {"prompt": Q, "context": "Docs.", "completion": A}, record(Q, (Completion(A),))),
        ({"score": "helpfulness"}, {"prompt": Q, "response": A, "helpfulness": 3, "verbosity": 1}, record(Q, (Completion(A, score=3.0),))),
    ],
)  # fmt: skip
def test_a_layout_is_declared(columns: dict[str, Any], row: dict[str, Any], expected: Record, tmp_path: Path) -> None:
    (found,), dropped, _ = read(tmp_path, row, columns=columns)
    assert same(found, expected), found
    assert dropped == Counter()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": Q, "context": "Docs.", "completion": A}, r"'context'; put it into .*data\.columns\.input=context.*ignore=\[context\]"),
        ({"prompt": Q, "images": ["a.png"], "completion": A}, r"the column 'images': halos trains on text.*ignore=\[images\]"),
        ({"prompt": chat(Q), "input": "Docs.", "completion": A}, "'input' to be empty next to a prompt of messages; found 'Docs.'"),
        ({"prompt": Q, "completion": A, "label": 1, "votes": {"down": 2}}, "found none for 'votes'"),
        ({"prompt": Q, "question": "other", "completion": A}, "found none for 'question'"),
        ({"prompt": Q, "completion": A, "log": chat("secret", "text")}, "found none for 'log'"),
        ({"prompt": Q, "response": A, "helpfulness": 3, "verbosity": 1}, r"data\.columns\.score=helpfulness or data\.columns\.score=verb"),
        ({"topic": Q, "essay": A, "verdict": "up"}, r"data\.columns\.prompt=topic data\.columns\.completion=essay"),
        ({"prompt": Q, "response_a": A, "response_b": B}, r"which of 'response_a' and 'response_b' is better.*columns\.winner"),
        ({"prompt": Q, "response_a": A, "response_b": B, "winner": 1}, r"data\.values\.first=\[…\]"),
        ({"chosen": "The answer is four.", "rejected": "The answer is five."}, r"is not clear; name.*data\.columns\.prompt"),
        ({"prompt": [{"role": "system", "content": "Be kind."}, *chat(Q)], "system": "Be brief.", "completion": A}, "prompt's system turn"),
    ],
)  # fmt: skip
def test_what_would_be_lost_or_guessed_is_refused(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"f\.jsonl:1: expected .*?" + words):
        read(tmp_path, row)


def test_weights_and_margins_reach_the_record(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{n}", "chosen": A, "rejected": B, "weight": w, "margin": m}
        for n, (w, m) in enumerate([(2, 0.5), (0, 1), ("0.5", None)])
    ]
    records, dropped, columns = read(tmp_path, *rows)
    assert [(r.weight, r.margin) for r in records] == [(2.0, 0.5), (0.5, None)]
    assert dropped == {"filtered: records with weight 0": 1}
    assert columns["weight: weight"] == 3
    with pytest.raises(ValueError, match=r"f\.jsonl:1: expected .*weight"):
        read(tmp_path, {**rows[0], "weight": -1})


def test_texts_of_a_spreadsheet_that_begin_with_a_brace_stay_texts(tmp_path: Path) -> None:
    file = tmp_path / "f.csv"
    file.write_text('question,answer,talk\n{x} is what?,"[[1, 2]] and {",""\n"{""a"": 1}",ok,""\n', encoding="utf-8")
    first, second = FeedbackFiles(str(file)).train().records
    assert (first.prompt, first.completions) == ("{x} is what?", (Completion("[[1, 2]] and {"),))
    assert second.prompt == '{"a": 1}'
    file.write_text('question,answer,talk\nq,a,"[[""Hello"", ""Hi""]]"\n', encoding="utf-8")
    (found,) = FeedbackFiles(str(file), columns={"history": "talk"}).train().records
    assert found.prompt == (Message("user", "Hello"), Message("assistant", "Hi"), Message("user", "q"))


def test_ties_are_left_out_or_kept(tmp_path: Path) -> None:
    row = {"prompt": Q, "response_a": A, "response_b": B, "winner": "tie"}
    won = {**row, "winner": "a"}
    records, dropped, _ = read(tmp_path, row, won)
    assert [r.preferences for r in records] == [((0, 1),)]
    assert dropped == {"filtered: ties (data.ties=keep keeps them)": 1}
    records, dropped, _ = read(tmp_path, row, won, ties="keep")
    assert [r.preferences for r in records] == [(), ((0, 1),)]
    assert dropped == Counter()


def test_transcripts_may_be_kept(tmp_path: Path) -> None:
    prompt = f"Human: {Q}\n\nAssistant:"
    (found,), _, _ = read(tmp_path, {"prompt": prompt, "completion": A}, transcripts="keep")
    assert found.prompt == prompt
    # Two turns of the human in a row: where the turns are is not clear, so the text stays.
    (found,), _, _ = read(tmp_path, {"prompt": f"Human: Hello\n\nHuman: {Q}\n\nAssistant:", "completion": A})
    assert isinstance(found.prompt, str)


def test_the_report_says_what_became_of_each_column(tmp_path: Path) -> None:
    rows = [
        {"question": Q, "answer": A, "thumb": "up", "note": "x"},
        {"question": "r", "answer": A, "thumb": "no", "note": ""},
    ]
    _, _, columns = read(tmp_path, *rows, columns={"ignore": ["note"]})
    assert columns == {"question: prompt": 2, "answer: completion": 2, "thumb: label": 2, "note: ignored": 2}


def test_names_of_roles_are_declared(tmp_path: Path) -> None:
    row = {"messages": [{"role": "kunde", "content": Q}, {"role": "berater", "content": A}]}
    with pytest.raises(ValueError, match="role"):
        read(tmp_path, row)
    (found,), _, _ = read(tmp_path, row, roles={"kunde": "user", "berater": "assistant"})
    assert same(found, record(USER, (Completion(A),)))


def test_bad_rows_are_skipped_with_counts_and_places(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    rows = [json.dumps({"prompt": f"q{n}", "completion": "a", "label": 1}) for n in range(3)]
    file.write_text(
        "\n".join([rows[0], "{broken", rows[1], json.dumps({"prompt": "q", "completion": "a", "label": None}), rows[2]])
    )
    with pytest.raises(ValueError, match=r"f\.jsonl:2: expected JSON"):
        FeedbackFiles(str(file)).train()
    records = FeedbackFiles(str(file), bad_rows="skip").train()
    assert [r.id for r in records.records] == [f"{file}:{n}" for n in (1, 3, 5)]
    assert records.dropped == {"filtered: malformed rows": 2}
    assert records.origins[str(file)].places["filtered: malformed rows"] == [f"{file}:2", f"{file}:4"]
    with pytest.raises(
        ValueError, match=r"expected up to data\.max_bad_rows = 1 malformed rows, found 2, the first at .*f\.jsonl:2"
    ):
        FeedbackFiles(str(file), bad_rows="skip", max_bad_rows=1).train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": {"prmpt": "q"}}, r"data\.columns\.prmpt: expected a role"),
        ({"columns": {"prompt": ["a", "b"]}}, r"data\.columns\.prompt: expected one column"),
        ({"columns": {"sides": ["a"]}}, r"data\.columns\.sides: expected two columns, found 1"),
        ({"columns": {"prompt": 3}}, r"data\.columns\.prompt: expected the name of a column, found 3"),
        ({"roles": {"x": "customer"}}, r"data\.roles\.x: expected one of"),
        ({"ties": "maybe"}, r"data\.ties: expected drop or keep"),
        ({"votes": 0.5}, r"data\.votes: expected majority, weights, or a share above 0\.5 and up to 1, found 0\.5"),
        ({"votes": "most"}, r"data\.votes: expected majority"),
        ({"max_bad_rows": -1}, r"data\.max_bad_rows"),
    ],
)
def test_declarations_are_checked(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        FeedbackFiles(str(tmp_path / "f.jsonl"), **options)


# (file, number of records, words on the command line)
FILES = {
    "alpaca_eval_annotations.json": 4, "alpaca_history.json": 4, "alpaca_input.json": 4, "alpaca_ranking.json": 4,
    "answers_ranked.jsonl": 4, "arena_winner.jsonl": 2, "better_response_id.jsonl": 4, "chosen_response.jsonl": 4,
    "content_parts.jsonl": 4, "implicit_prompt_text.jsonl": 4, "label_studio.json": 4, "labels_emoji.jsonl": 8,
    "labels_floats.csv": 8, "labels_signs.jsonl": 8, "labels_words.jsonl": 8, "labels_yes_no.csv": 8,
    "messages_chosen_object.jsonl": 4, "open_webui.json": 4, "openai_preference.jsonl": 4, "orca_columns.jsonl": 4,
    "reply_repeats_prompt.jsonl": 4, "sharegpt.json": 4, "sharegpt_labels.jsonl": 8, "sharegpt_pairs.json": 4,
    "stars.csv": 4, "tools_column.jsonl": 4, "transcript_in_prompt.jsonl": 4, "two_answers_scored.jsonl": 4, "weights.jsonl": 3,
}  # fmt: skip
GOOD = ("Paris.", "Eleven.", "Put it into boiling water for eight minutes.", "Yes, about 3.5 percent.")
BAD = ("Lyon.", "Twelve.", "Throw it at the wall.", "No idea.")
QUESTIONS = ("capital of France?", "prime number above ten.", "boil an egg?", "sea salty?")


@pytest.mark.skipif(not SHARED.is_dir() and not os.environ.get("CI"), reason="needs the small files of shared/data")
@pytest.mark.parametrize("name", FILES)
def test_every_shared_file_is_read_by_itself(name: str) -> None:
    records = list(FeedbackFiles(str(SHARED / name)).train().records)
    assert len(records) == FILES[name]
    for one in records:
        last = (
            one.prompt
            if isinstance(one.prompt, str)
            else next(t.content for t in reversed(messages_of(one.prompt)) if t.role == "user")
        )
        topic = next(n for n, question in enumerate(QUESTIONS) if last.endswith(question))
        for completion in one.completions:
            text = completion.text.removeprefix(last).strip().removeprefix("Maybe. ")
            assert text in (GOOD[topic], BAD[topic])
            if completion.desirable is not None:
                assert completion.desirable == (text == GOOD[topic])
        for better, worse in (
            one.preferences if name != "arena_winner.jsonl" else ()
        ):  # one voter preferred the wrong reply
            assert GOOD[topic] in one.completions[better].text or BAD[topic] in one.completions[worse].text


@pytest.mark.parametrize(
    ("header", "cells", "columns", "expected"),
    [
        ("prompt,response_a,response_b,winner", (Q, [{"from": "gpt", "value": A}], [{"from": "gpt", "value": B}], "a"), {},
         record(Q, PAIR, (0, 1))),
        ("fields,label", ({"prompt": Q, "response": A}, "yes"),
         {"prompt": "fields.prompt", "completion": "fields.response"}, record(Q, (Completion(A, True),))),
        ("prompt,completion,label", (Q, '{"code": 1}', "yes"), {}, record(Q, (Completion('{"code": 1}', True),))),
    ],
    ids=["ShareGPT's messages", "a dotted path", "a text that is JSON"],
)  # fmt: skip
def test_json_in_the_cells_of_a_table(
    header: str, cells: tuple[Any, ...], columns: dict[str, str], expected: Record, tmp_path: Path
) -> None:
    file = tmp_path / "f.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        texts = [cell if isinstance(cell, str) else json.dumps(cell) for cell in cells]
        csv.writer(stream).writerows([header.split(","), texts])
    (found,) = FeedbackFiles(str(file), columns=columns).train().records
    assert same(found, expected), found


def test_content_that_only_a_later_task_of_an_export_has_is_refused(tmp_path: Path) -> None:
    row, _ = BY_ITSELF["label studio, choices"]
    with pytest.raises(ValueError, match="context"):
        read(
            tmp_path,
            *({**row, "data": {**row["data"], "context": text}} for text in (None, "a text that would be lost")),
        )
