"""A record for each assistant turn of a conversation."""

from halos.data.records.record import Completion, Conversation, Message, Record, json_text
from halos.data.records.table import table_of
from halos.data.store.arrow import Store
from halos.data.views.turns import expand_turns


def test_every_assistant_turn_once() -> None:
    said = ["user", "assistant", "user", "assistant", "assistant", "user"]
    prompt = tuple(Message(role, f"{n}") for n, role in enumerate(said))
    records = [
        Record("r", prompt, (Completion("last"), Completion("other"))),
        Record("s", "text", (Completion("b"),)),
        Record("t", prompt, (Completion("bad", False),)),  # nothing to imitate: its earlier turns are not either
    ]
    expanded, report = expand_turns(table_of(records), Store())
    assert [(r.id, len(r.prompt) if isinstance(r.prompt, tuple) else 0, r.completions[0].text) for r in expanded] == [
        ("r.1", 1, "1"),
        ("r.3", 3, "3"),
        ("r", 6, "last"),
        ("s", 0, "b"),
        ("t", 6, "bad"),
    ]
    assert report == {"earlier assistant turns": 2, "earlier assistant turns left out": 1}


def test_turns_of_weight_0_and_calls_of_tools() -> None:
    call = Message("assistant", "", json_text({"tool_calls": [{"name": "f"}]}))
    turns = (
        Message("user", "q"),
        Message("assistant", "bad", weight=0),
        Message("user", "again"),
        call,
        Message("tool", "found"),
    )
    record = Record("r", Conversation(turns, '[{"name": "f"}]'), (Completion("last"),))
    expanded, report = expand_turns(table_of([record]), Store())
    earlier = Record("r.3", Conversation(turns[:3], '[{"name": "f"}]'), (Completion.of((call,)),))
    assert list(expanded) == [earlier, record]
    assert report == {"earlier assistant turns": 1, "earlier assistant turns of weight 0 left out": 1}


def test_every_turn_of_a_reply_with_several() -> None:
    call = Message("assistant", "", json_text({"tool_calls": [{"name": "f"}]}))
    unsaid = Message("assistant", "hm", weight=0)
    q, found, last = Message("user", "q"), Message("tool", "found"), Message("assistant", "last")
    reply = Completion.of((call, found, unsaid, q, last))
    start, tools = (q, Message("assistant", "hi"), q), '[{"name": "f"}]'
    record = Record("r", Conversation(start, tools), (Completion("bad"), reply, Completion("good")), ((1, 0), (2, 0)))
    expanded, report = expand_turns(table_of([record]), Store())
    assert list(expanded) == [
        Record("r.1", Conversation(start[:1], tools), (Completion("hi"),)),
        Record("r/1.3", Conversation(start, tools), (Completion.of((call,)),)),
        Record("r/1", Conversation((*start, call, found, unsaid, q), tools), (Completion("last"),)),
        Record("r/2", Conversation(start, tools), (Completion("good"),)),
    ]
    assert report == {"earlier assistant turns": 2, "earlier assistant turns of weight 0 left out": 1}
