"""Reads the parts that rows of every layout have: prompts, replies, scores, weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from halos.data.layouts.agreement import TextOrTurns, check_agreement
from halos.data.layouts.chats import (
    ROLE_NAMES,
    chat_of,
    conversation_in,
    history_of,
    looks_like_transcript,
    transcript_of,
    with_turns,
)
from halos.data.layouts.roles import Declaration, Path, Roles, has_content, value_at
from halos.data.layouts.values import score_in
from halos.data.reading.fields import RawRow, prompt_of, reply_of, required, text_of, wrong
from halos.data.records.adapted import FILTERED, NOTED
from halos.data.records.record import Message, Record, Reply, turns_of_reply

NO_WEIGHT = f"{FILTERED}records with weight 0"
Preferences = tuple[tuple[int, int], ...]


class RowReader:
    """Reads the parts of a row by the roles of its columns.

    Args:
        roles: the columns of each role.
        declaration: the user's settings for values, roles of messages, ties and transcripts.
    """

    def __init__(self, roles: Roles, declaration: Declaration) -> None:
        self.roles, self.declaration, self.values = roles, declaration, declaration.values
        self.role_names = {**ROLE_NAMES, **declaration.roles}
        self._is_weighed = "weight" in roles or "margin" in roles

    def _value(self, row: RawRow, role: str) -> object:
        path = self.roles.get(role)
        if not isinstance(path, str):
            return None
        value = value_at(row, path)
        return None if value == "" else value  # an empty cell of a spreadsheet

    def _required(self, where: str, row: RawRow, role: str) -> tuple[str, object]:
        path = self.roles.get(role, role)
        if not isinstance(path, str):
            raise ValueError(f"{where}: expected one column for {role!r}, found {len(path)}")
        value = value_at(row, path)
        if value is None:
            required(where, row, path)  # raises unless the path leads into a column
            raise wrong(where, path, "given", None)
        return path, value

    def _prompt(self, where: str, row: RawRow, dropped: Counter[str]) -> TextOrTurns | None:
        """Return the prompt of a row with its history and input; None where it has no prompt."""
        role = "prompt" if "prompt" in self.roles else "messages"
        path, value = self.roles.get(role), self._value(row, role)
        if value is None or not isinstance(path, str):
            return None
        prompt = prompt_of(where, {path: chat_of(value, self.role_names)}, path)
        if isinstance(prompt, str):
            prompt = self._with_input(where, row, prompt)
            prompt = self._turns_of_transcript(prompt, dropped)
        elif has_content(self._value(row, "input")):
            raise wrong(
                where, str(self.roles["input"]), "empty next to a prompt of messages", self._value(row, "input")
            )
        return self._with_history(where, row, prompt)

    def _with_input(self, where: str, row: RawRow, prompt: str) -> str:
        value = self._value(row, "input")
        if not has_content(value):
            return prompt
        return f"{prompt}\n{text_of(where, str(self.roles['input']), value)}"

    def _turns_of_transcript(self, prompt: str, dropped: Counter[str]) -> TextOrTurns:
        if not looks_like_transcript(prompt):
            return prompt
        turns = transcript_of(prompt) if self.declaration.split_transcripts else None
        dropped[f"{NOTED}{'transcripts split into turns' if turns else 'prompts that look like a transcript'}"] += 1
        return turns or prompt

    def _with_history(self, where: str, row: RawRow, prompt: TextOrTurns) -> TextOrTurns:
        history = self._value(row, "history")
        if not has_content(history):
            return prompt
        return with_turns(prompt, history_of(where, str(self.roles["history"]), history, self.role_names))

    def _reply(
        self, where: str, row: RawRow, path: Path, row_prompt: TextOrTurns | None
    ) -> tuple[tuple[Message, ...], Reply]:
        """Return the turns in a completion's column: those before the completion, and the completion.

        If the row has a prompt and the turns begin with an assistant turn, all turns are the completion.
        """
        value = chat_of(value_at(row, path), self.role_names)
        if value is None:
            required(where, row, path)
        if self.declaration.split_transcripts and isinstance(value, str) and (turns := conversation_in(value)):
            return turns[:-1], turns[-1].content
        before, reply = reply_of(where, {path: value}, path)
        if row_prompt is not None and before and before[0].role == "assistant":
            return (), (*before, *turns_of_reply(reply))
        return before, reply

    def _agreed(
        self, where: str, path: Path, row_prompt: TextOrTurns | None, before: tuple[Message, ...]
    ) -> TextOrTurns | None:
        """Return the prompt of a completion: the turns before it, or else the row's prompt. The two have to agree."""
        prompt = before or row_prompt
        if before and row_prompt is not None:
            check_agreement(where, path, row_prompt, before)
        return prompt

    def _score(self, where: str, row: RawRow, path: Path | None) -> float | None:
        return None if path is None else score_in(where, path, value_at(row, path))

    def _weighed(self, where: str, row: RawRow, record: Record, dropped: Counter[str]) -> Record | None:
        """Return the record with the weight and margin of its row; None if the weight is 0."""
        if not self._is_weighed:
            return record
        weight, margin = (
            self._score(where, row, path) if isinstance(path := self.roles.get(role), str) else None
            for role in ("weight", "margin")
        )
        if weight == 0:
            dropped[NO_WEIGHT] += 1
            return None
        if weight is None and margin is None:
            return record
        return replace(record, weight=1.0 if weight is None else weight, margin=margin)
