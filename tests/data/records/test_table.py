"""Records come back from their table as they were; digests tell apart what differs."""

from itertools import combinations

from halos.data.records.record import Completion, Conversation, Message, Prompt, Record, json_text
from halos.data.records.table import table_of

CALL = Message("assistant", "", json_text({"tool_calls": [{"name": "f", "arguments": {"b": None, "a": 1}}]}))
ASKED = (Message("user", "q"), CALL, Message("tool", "found", '{"name": "f"}'))
TOOLS = '[{"name": "f", "description": null}]'
RECORDS = [
    Record("a", "q", (Completion("x", True), Completion("y", score=-1.0)), ((0, 1),)),
    Record("b", ASKED, (Completion.of((CALL,), False), Completion(CALL.text))),
    Record("c", (Message("user", "q"), Message("assistant", "a", weight=0), Message("user", "r")), (Completion("x"),)),
    Record("d", Conversation((Message("user", "q"),), TOOLS), (Completion.of((CALL, *ASKED, CALL), score=1.0),)),
    Record("e", Conversation(ASKED, "", '{"enable_thinking": false}'), (Completion("x"), Completion.of((CALL,)))),
]


def test_records_come_back_from_their_table() -> None:
    table = table_of(RECORDS)
    assert list(table) == RECORDS
    assert [table[2], table[0]] == [RECORDS[2], RECORDS[0]]
    assert [batch.column("extra").to_pylist()[0] for batch in table.table.batches] == [None], "none for plain texts"


def test_digests_tell_calls_tools_and_variables_apart() -> None:
    turns = (Message("user", "q"),)
    prompts: list[Prompt] = [
        "q",
        ASKED,
        Conversation(turns, TOOLS),
        Conversation(turns, template_kwargs="{}"),
        (*ASKED[:2], Message("tool", "found")),
    ]
    table = table_of([Record(f"{n}", prompt, (Completion("x"),)) for n, prompt in enumerate(prompts)])
    assert len({*table.numbers("prompt").tolist()}) == len(prompts)
    assert len({*table.numbers("loose_prompt").tolist()}) == len(prompts)
    # The text of a reply with turns is for readers: a reply of that very text is another one.
    replies = (Completion.of((CALL,)), Completion(CALL.text), Completion.of((CALL, CALL)))
    table = table_of([Record("r", "q", replies, tuple(combinations(range(3), 2)))])
    assert len({*table.lists("completions")[1].tolist()}) == len(replies)
    assert all(table.lists("pairs")[1].tolist()), "no two of them are equal"


def test_weights_do_not_make_another_prompt() -> None:
    prompts = [(Message("user", "q"), Message("assistant", "a", weight=w), Message("user", "r")) for w in (0, 1)]
    table = table_of([Record(f"{w}", prompt, (Completion("x"),)) for w, prompt in enumerate(prompts)])
    assert len({*table.numbers("prompt").tolist()}) == 1
