"""HH transcripts, by hand and on the real harmless-base test split."""

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from halos.data.reading.files import Piece, read_piece
from halos.data.records.record import Completion, Message, Record, messages_of, turns_of_reply
from halos.data.sources.hh import HHSource

HARMLESS = Path(__file__).parents[4] / "shared/data/hh-rlhf/harmless-base-test.jsonl.gz"
needs_harmless = pytest.mark.skipif(not HARMLESS.exists() and "CI" not in os.environ, reason="no HH data here")


def read(chosen: object, rejected: object) -> tuple[Record | None, Counter[str]]:
    dropped = Counter[str]()
    return HHSource().record("f:3", {"chosen": chosen, "rejected": rejected}, dropped), dropped


def prompt(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in turns)


def test_one_turn() -> None:
    pair = read("\n\nHuman: q: 1\n2 \n\nAssistant: a\n\nb", "\n\nHuman: q: 1\n2 \n\nAssistant:")
    assert pair == (None, Counter({"empty completion": 1, "completion whose pair has an empty side": 1}))
    pair = read("\n\nHuman: q: 1\n2 \n\nAssistant: a\n\nb ", "\n\nHuman: q: 1\n2 \n\nAssistant:c")
    completions = (Completion("a\n\nb"), Completion("c"))
    assert pair == (Record("f:3", prompt(("user", "q: 1\n2")), completions, ((0, 1),)), Counter())


def test_many_turns() -> None:
    start = "\n\nHuman: q\n\nAssistant: a \n\nHuman:  r?\n\nAssistant: "
    record, _ = read(start + "yes", start + "no")
    assert record is not None
    assert record.prompt == prompt(("user", "q"), ("assistant", "a"), ("user", "r?"))
    assert record.completions == (Completion("yes"), Completion("no"))


def test_transcripts_that_part_early_have_completions_of_several_turns() -> None:
    start = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
    record, dropped = read(f"{start} b\n\nHuman: s\n\nAssistant: c", f"{start} d")
    assert record is not None
    assert record.prompt == prompt(("user", "q"), ("assistant", "a"), ("user", "r"))
    longer = prompt(("assistant", "b"), ("user", "s"), ("assistant", "c"))
    assert [one.reply for one in record.completions] == [longer, "d"]
    assert not dropped


def test_what_the_human_said_differently_is_no_completion() -> None:
    # The transcripts part at a human turn; the last turn that both begin their replies after is the one before it.
    start = "\n\nHuman: q\n\nAssistant: a\n\nHuman:"
    record, _ = read(f"{start} r\n\nAssistant: b", f"{start} s\n\nAssistant: c")
    assert record is not None
    assert record.prompt == prompt(("user", "q"))
    assert record.completions[0].reply == prompt(("assistant", "a"), ("user", "r"), ("assistant", "b"))
    empty = read(f"{start} r\n\nAssistant:", f"{start} s\n\nAssistant: c")
    assert empty == (None, Counter({"pair with an empty turn in a completion": 1}))


def test_turns_of_one_role_in_a_row_become_one() -> None:
    start = "\n\nHuman: q\n\nHuman: more\n\nAssistant: a\n\nAssistant: b\n\nHuman: r\n\nAssistant: "
    record, _ = read(start + "yes", start + "no")
    assert record is not None
    assert record.prompt == prompt(("user", "q\n\nmore"), ("assistant", "a\n\nb"), ("user", "r"))


def test_an_assistant_turn_before_the_last_opens_both_completions() -> None:
    start = "\n\nHuman: q\n\nAssistant: first\n\nAssistant: "
    record, _ = read(start + "yes", start)
    assert record is not None
    assert record.prompt == prompt(("user", "q"))
    assert record.completions == (Completion("first\n\nyes"), Completion("first"))


def test_a_completion_says_nothing_for_the_human() -> None:
    good, ends = "\n\nHuman: q\n\nAssistant: c", "\n\nHuman: q\n\nAssistant: a\n\nHuman: b"
    for sides in ((ends, good), (good, ends), (ends, ends), (good, "\n\nHuman: q\n\nAssistant:\n\nHuman: b")):
        assert read(*sides) == (None, Counter({"pair with a side that ends with a human turn": 1}))


def test_dropped_pairs() -> None:
    different = read("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: p\n\nAssistant: a")
    assert different == (None, Counter({"pair with different prompts": 1}))
    assert read(*["\n\nHuman: \n\nAssistant: a"] * 2) == (None, Counter({"pair with an empty prompt": 1}))


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "hello",
        "\n\nHuman: q",
        "\n\nAssistant: a",
        "\n\nAssistant: a\n\nHuman: q\n\nAssistant: b",
        "hi\n\nAssistant: a",
        "hi\n\nHuman: q\n\nAssistant: a",
    ],
)
def test_malformed_transcript(broken: str) -> None:
    good = "\n\nHuman: q\n\nAssistant: a"
    with pytest.raises(ValueError, match=r"^f:3: expected 'chosen' to be a transcript"):
        read(broken, good)
    with pytest.raises(ValueError, match=r"^f:3: expected 'rejected' to be a transcript"):
        read(good, broken)


def test_fields_of_another_format() -> None:
    with pytest.raises(ValueError, match=r"^f:3: expected 'chosen' to be a text; found"):
        read([{"role": "user", "content": "q"}], "x")
    with pytest.raises(ValueError, match=r"^f:3: expected the key 'chosen'; found 'prompt'"):
        HHSource().record("f:3", {"prompt": "q"}, Counter())


def words(text: str) -> list[str]:
    """What is said and by whom, up to whitespace; a speaker who goes on is named once."""
    spoken, last = "", ""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        spoken += f" {said}" if speaker == last else f" {speaker}> {said}"
        last = speaker
    return spoken.split()


def rendered(record: Record, completion: Completion) -> list[str]:
    speakers = {"user": "Human> ", "assistant": "Assistant> "}
    turns = [*messages_of(record.prompt), *turns_of_reply(completion.reply)]
    return " ".join(speakers[turn.role] + turn.content for turn in turns).split()


@needs_harmless
def test_no_text_of_the_real_data_is_lost() -> None:
    dropped = Counter[str]()
    kept = 0
    for where, row in read_piece(Piece(HARMLESS)):
        record = HHSource().record(where, row, dropped)
        if record is not None:
            kept += 1
            assert record.id == f"{HARMLESS}:{where.rsplit(':', 1)[1]}"
            assert record.preferences == ((0, 1),)
            assert rendered(record, record.completions[0]) == words(str(row["chosen"]))
            assert rendered(record, record.completions[1]) == words(str(row["rejected"]))
    assert kept == 2312 - 4
    assert dropped == {
        "empty completion": 4,
        "completion whose pair has an empty side": 4,
    }


@needs_harmless
def test_real_prompts_alternate_and_end_with_the_user() -> None:
    for record in HHSource(HARMLESS).train().records:
        roles = [turn.role for turn in messages_of(record.prompt)]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
