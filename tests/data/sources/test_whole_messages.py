"""Tools, calls, thoughts, system texts and weights in every format that has messages, with its record by hand."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halos.data.layouts.layouts import to_record
from halos.data.preparation.writing import write_jsonl
from halos.data.records.record import Completion, Conversation, Message, Record, messages_of
from halos.data.sources.feedback_files import FeedbackFiles

Q = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
FOUND = {"role": "tool", "content": "found", "tool_call_id": "c"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}
THINKS = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
USER, SYSTEM, TOOL = Message("user", "q"), Message("system", "s"), Message("tool", "found", '{"tool_call_id": "c"}')
CALLS = Message("assistant", "", '{"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {}}}]}')
THOUGHT = Message("assistant", "a", '{"reasoning_content": "hm"}')
TOOLS, TOOLS_TEXT = [{"name": "f"}], '[{"name": "f"}]'
CALLED, THOUGHTFUL = Completion.of((CALLS,)), Completion.of((THOUGHT,))

GOLDEN: dict[str, tuple[dict[str, Any], Record]] = {
    "messages": (
        {"messages": [Q, CALL, FOUND, THINKS], "tools": TOOLS},
        Record("f:3", Conversation((USER, CALLS, TOOL), TOOLS_TEXT), (THOUGHTFUL,)),
    ),
    "messages whose reply is a call, labelled": (
        {"messages": [Q, CALL], "label": True, "system": "s", "tools": TOOLS_TEXT},
        Record("f:3", Conversation((SYSTEM, USER), TOOLS_TEXT), (Completion.of((CALLS,), True),)),
    ),
    "chosen and rejected": (
        {"prompt": [Q, CALL, FOUND], "chosen": [THINKS], "rejected": [CALL], "score_chosen": 2},
        Record("f:3", (USER, CALLS, TOOL), (Completion.of((THOUGHT,), score=2.0), CALLED), ((0, 1),)),
    ),
    "chosen and rejected, implicit prompt": (
        {"chosen": [Q, CALL], "rejected": [Q, A], "chat_template_kwargs": {"enable_thinking": False}},
        Record("f:3", Conversation((USER,), "", '{"enable_thinking": false}'), (CALLED, Completion("a")), ((0, 1),)),
    ),
    "completion": (
        {"prompt": "q", "completion": [CALL], "label": False, "tools": TOOLS},
        Record("f:3", Conversation((USER,), TOOLS_TEXT), (Completion.of((CALLS,), False),)),
    ),
    "completion with its conversation": (
        {"prompt": [Q], "completion": [Q, CALL], "score": 1},
        Record("f:3", (USER,), (Completion.of((CALLS,), score=1.0),)),
    ),
    "output": (
        {"prompt": "q", "output": [THINKS], "reward": 1, "system": "s"},
        Record("f:3", (SYSTEM, USER), (Completion.of((THOUGHT,), score=1.0),)),
    ),
    "outputs": (
        {"prompt": "q", "output_A": [CALL], "output_B": [A], "label": 1, "tools": TOOLS},
        Record("f:3", Conversation((USER,), TOOLS_TEXT), (CALLED, Completion("a")), ((0, 1),)),
    ),
    "own": (
        {"prompt": [Q], "completions": [{"messages": [CALL, FOUND, A], "score": 1}, {"text": "a"}], "tools": TOOLS},
        Record(
            "f:3",
            Conversation((USER,), TOOLS_TEXT),
            (Completion.of((CALLS, TOOL, Message("assistant", "a")), score=1.0), Completion("a")),
        ),
    ),
    "weights": (
        {"messages": [Q, {**A, "weight": 0}, Q, {**A, "weight": 1}]},
        Record("f:3", (USER, Message("assistant", "a", weight=0), USER), (Completion("a"),)),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_record(name: str) -> None:
    row, expected = GOLDEN[name]
    dropped: Counter[str] = Counter()
    assert to_record("f:3", row, dropped) == expected
    assert not dropped


def test_a_table_gives_the_same_records(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [Q, CALL, FOUND, {**A, "weight": 0}, Q, THINKS], "tools": [{"name": "f"}], "system": "s"},
        {"messages": [Q, {**A, "name": "Bob"}], "tools": [{"about": "g"}], "chat_template_kwargs": {"tone": "kind"}},
        {"messages": [Q, {**A, "weight": 1}], "images": []},
    ]
    rows = json.loads(json.dumps(rows, sort_keys=True))  # older versions of pyarrow sort the fields of structs
    write_jsonl(tmp_path / "r.jsonl", rows)
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), tmp_path / "r.parquet")
    stored = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert (stored[2]["messages"][0]["tool_calls"], stored[0]["tools"][0]) == (None, {"name": "f", "about": None})
    written, read = (FeedbackFiles(tmp_path / name).train().records for name in ("r.jsonl", "r.parquet"))
    assert [(one.prompt, one.completions) for one in read] == [(one.prompt, one.completions) for one in written]
    assert [len(messages_of(one.prompt)) for one in read] == [6, 1, 1]


def test_a_conversation_ends_with_its_last_trained_reply() -> None:
    dropped: Counter[str] = Counter()
    unsaid = {**A, "weight": 0}
    record = to_record("f:3", {"messages": [Q, {**THINKS, "weight": 1}, Q, unsaid]}, dropped)
    assert record == Record("f:3", (USER,), (THOUGHTFUL,))
    assert dropped == {"filtered: turn after the last reply of weight 1": 2}
    assert to_record("f:3", {"messages": [Q, unsaid, Q, unsaid]}, dropped) is None
    assert dropped["filtered: conversation without a reply of weight 1"] == 1
    with pytest.raises(ValueError, match=r"^f:3: expected 'chosen\[1\].weight' to be 1, as the last turn is the comp"):
        to_record("f:3", {"chosen": [Q, unsaid], "rejected": [Q, A]}, dropped)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "q", "completions": [{"text": "a", "messages": [A]}]},
            "expected 'completions.0.' to be an object",
        ),
        ({"prompt": "q", "completions": [{"messages": [A, Q]}]}, "expected a reply to begin and end with an assistant"),
        (
            {"prompt": "q", "completions": [{"messages": [{**A, "weight": 0}]}]},
            r"expected 'completions\[0\].messages\[0\].weight' to be 1, as the last turn is judged; found 0",
        ),
        ({"prompt": "q", "completions": [{"messages": [A, {"role": "x"}]}]}, r"expected 'completions.0..messages\[1\]"),
        (
            {"prompt": "q", "completion": "a", "images": ["a.png"]},
            "expected text, found the column 'images'",
        ),
    ],
)
def test_what_is_refused(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^f:3: {expected}"):
        to_record("f:3", row, Counter())
