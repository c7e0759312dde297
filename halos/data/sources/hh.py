"""Anthropic's HH transcripts: ``\\n\\nHuman: ... \\n\\nAssistant: ...`` as ``chosen`` and ``rejected``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import final

from halos.data.layouts.chats import diverging
from halos.data.reading.fields import RawRow, required, text_of, wrong
from halos.data.records.adapted import DIFFERENT_PROMPTS, without_empty
from halos.data.records.record import Completion, Message, Record
from halos.data.sources.file_source import Columns, Files, RowSource

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLE = {"Human": "user", "Assistant": "assistant"}


def _split(where: str, key: str, row: RawRow) -> tuple[list[Message], str]:
    text = text_of(where, key, required(where, row, key))
    before, marker, completion = text.rpartition("\n\nAssistant:")
    turns = _turns(before)
    if not marker or not turns or turns[0].role != "user":
        raise wrong(where, key, "a transcript '\\n\\nHuman: ...\\n\\nAssistant: ...'", text)
    return turns, completion


def _turns(transcript: str) -> list[Message]:
    """Split a transcript into turns; none if it does not start with one.

    Turns of one role in a row become one turn, as chat templates expect the roles to alternate.
    """
    opening, *rest = TURN.split("\n\n" + transcript.lstrip())
    turns: list[Message] = []
    for speaker, text in zip(rest[::2], rest[1::2], strict=True):
        role, content = ROLE[speaker], text.strip()
        if turns and turns[-1].role == role:
            content = f"{turns.pop().content}\n\n{content}".strip()
        turns.append(Message(role, content))
    return [] if opening.strip() else turns


def hh_record(where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
    """Adapt a pair of transcripts.

    The text up to the last ``\\n\\nAssistant:`` is the prompt. Where the transcripts part before it, what they share is
    the prompt, and the turns that follow are the completions.
    """
    turns, chosen = _split(where, "chosen", row)
    others, rejected = _split(where, "rejected", row)
    if any(TURN.search(completion) for completion in (chosen, rejected)):
        # The policy would learn to speak for the human.
        dropped["pair with a side that ends with a human turn"] += 1
        return None
    sides = _with_reply(turns, chosen), _with_reply(others, rejected)
    parted = diverging(*sides)
    if turns == others:  # the replies to one prompt may be equal, and then nothing parts
        start = len(sides[0]) - 1
        parted = sides[0][:start], sides[0][start:], sides[1][start:]
    if parted is None:
        dropped[DIFFERENT_PROMPTS] += 1
        return None
    prompt, *replies = parted
    if not any(turn.content for turn in prompt):
        dropped["pair with an empty prompt"] += 1
        return None
    if any(len(reply) > 1 and not all(turn.content for turn in reply) for reply in replies):
        dropped["pair with an empty turn in a completion"] += 1
        return None
    return without_empty(Record(where, prompt, tuple(map(Completion.of, replies)), ((0, 1),)), dropped)


def _with_reply(turns: Sequence[Message], reply: str) -> tuple[Message, ...]:
    """Return the turns with the assistant's reply after them."""
    reply = reply.strip()
    if turns[-1].role == "assistant":
        return (*turns[:-1], Message("assistant", f"{turns[-1].content}\n\n{reply}".strip()))
    return (*turns, Message("assistant", reply))


@final
class HHSource(RowSource):
    """Transcripts in the format of Anthropic's HH-RLHF.

    ``Anthropic/hh-rlhf:test`` is the test split of all subsets together, ``Anthropic/hh-rlhf/helpful-base:train`` the
    training split of one subset.
    """

    name = "hh"

    def __init__(
        self,
        train: Files | None = "Anthropic/hh-rlhf:train",
        val: Files | None = None,
        columns: Columns = None,
        bad_rows: str = "stop",
        max_bad_rows: int = 100,
    ) -> None:
        super().__init__(train, val, columns, bad_rows, max_bad_rows)

    def record(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        return hh_record(where, row, dropped)
