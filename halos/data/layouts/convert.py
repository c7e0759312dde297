"""Converts a row, given the roles of its columns, to a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from halos.data.layouts.agreement import TextOrTurns
from halos.data.layouts.chats import conversation_of, trained_turns
from halos.data.layouts.hints import missing_prompt
from halos.data.layouts.lists import ListReader
from halos.data.layouts.pairs import PairReader
from halos.data.layouts.roles import COMMON_ROLES, ROLES_OF, Declaration, Roles, has_content, kind_of, value_at
from halos.data.layouts.steps import check_reply, steps_of
from halos.data.layouts.votes import DISAGREE, UNDECIDED, counted_votes, vote_count
from halos.data.reading.context import in_context
from halos.data.reading.fields import RawRow, reply_of, required, wrong
from halos.data.records.adapted import FILTERED, NOTED, without_empty
from halos.data.records.record import Completion, Record, Reply, Step, messages_of as turns_of

CONTEXT = ("system", "tools", "chat_template_kwargs")
NO_VERDICT = f"{FILTERED}rows whose label says nothing (data.values.tie)"


class Converter(PairReader, ListReader):
    """Converts rows whose columns have the same roles to records.

    Args:
        roles: the columns of each role.
        declaration: the user's settings for values, roles of messages, ties and transcripts.
    """

    def __init__(self, roles: Roles, declaration: Declaration) -> None:
        super().__init__(roles, declaration)
        kinds: dict[str, Callable[[str, RawRow, Counter[str]], Record | None]] = {
            "completions": self._listed,
            "sides": self._compared,
            "chosen": self._preferred,
            "completion": self._single,
            "steps": self._single,
        }
        self._context = [name for name in CONTEXT if name in roles]
        kind = kind_of(roles)
        self._convert = kinds.get(kind, self._conversation)
        if unused := [role for role in declaration.columns if role not in (kind, *COMMON_ROLES, *ROLES_OF[kind])]:
            raise ValueError(
                f"data.columns.{unused[0]}: expected a role of rows with {kind} ({', '.join(ROLES_OF[kind])}), found "
                f"{roles[unused[0]]!r}, which would not be used"
            )

    def __call__(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        """Return the record of a row; None if nothing is left of it.

        Args:
            where: the location of the row.
            row: the row.
            dropped: counts what is left out, and what is only noted, such as conversions.

        Raises:
            ValueError: the row is malformed.
        """
        record = self._convert(where, row, dropped)
        if record is None:
            return None
        context = {name: value for name in self._context if (value := self._value(row, name)) is not None}
        if context:
            record = replace(record, prompt=in_context(where, context, record.prompt))
        note_oddities(record, dropped)
        return without_empty(record, dropped)

    def _single(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        prompt = self._prompt(where, row, dropped)
        joined, steps = self._steps(where, row, dropped)
        reply: Reply = joined
        if "completion" in self.roles:
            path, _ = self._required(where, row, "completion")
            before, reply = self._reply(where, row, path, prompt)
            prompt = self._agreed(where, path, prompt, before)
            if steps:
                check_reply(where, str(self.roles["steps"]), joined, reply)
        if prompt is None:
            raise missing_prompt(where, row, self.roles)
        return self._judged(where, row, prompt, reply, dropped, steps)

    def _steps(self, where: str, row: RawRow, dropped: Counter[str]) -> tuple[str, tuple[Step, ...]]:
        """Return the text that the row's steps join to, and the steps; both are empty if the reply has no steps."""
        path = self.roles.get("steps")
        if not isinstance(path, str) or ("completion" in self.roles and not has_content(value_at(row, path))):
            return "", ()
        return steps_of(where, path, self._required(where, row, "steps")[1], self.values, dropped)

    def _conversation(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        path, value = self._required(where, row, "messages")
        turns = trained_turns(conversation_of(value, self.role_names), dropped)
        if isinstance(turns, str):
            raise wrong(where, path, "a list of messages, or a transcript 'Human: … Assistant: …'", value)
        if turns is None:
            return None
        before, reply = reply_of(where, {path: turns}, path)
        if not before:
            raise wrong(where, path, "a prompt and an assistant's turn after it", value)
        return self._judged(where, row, self._with_history(where, row, before), reply, dropped)

    def _judged(
        self,
        where: str,
        row: RawRow,
        prompt: TextOrTurns,
        reply: Reply,
        dropped: Counter[str],
        steps: tuple[Step, ...] = (),
    ) -> Record | None:
        """Return the record of one reply with its feedback; None if its label or votes do not decide."""
        label, vote_weight = None, 1.0
        path = self.roles.get("label")
        if isinstance(path, str):
            if "." not in path and path not in row:
                required(where, row, path)
            if self.values.leaves_out(value_at(row, path)):
                dropped[NO_VERDICT] += 1
                return None
            # A label that is present but null is an error, not a completion without feedback.
            label = self.values.label(where, path, value_at(row, path))
        elif (counts := self._votes(where, row)) is not None:
            if all(counts):
                dropped[DISAGREE] += 1
            verdict = self.declaration.votes.verdict(*counts)
            if verdict is None:
                dropped[UNDECIDED] += 1
                return None
            label, vote_weight = verdict
        score = self.roles.get("score")
        completion = Completion.of(reply, label, self._score(where, row, score if isinstance(score, str) else None))
        completion = replace(completion, steps=steps)
        record = self._weighed(where, row, Record(where, prompt, (completion,)), dropped)
        return record and replace(record, weight=record.weight * vote_weight)

    def _votes(self, where: str, row: RawRow) -> tuple[int, int] | None:
        """Return the numbers of votes for desirable and undesirable; None if nobody voted."""
        paths = self.roles.get("votes")
        if paths is None:
            return None
        if isinstance(paths, str):
            votes = value_at(row, paths)
            counts = (0, 0) if votes is None else counted_votes(where, paths, votes, self.values)
        else:
            up, down = (vote_count(where, path, value_at(row, path)) for path in paths)
            counts = up, down
        return counts if any(counts) else None


MARKUP = ("<|", "[INST]", "<start_of_turn>", "<br", "</p>", "&nbsp;", "&quot;", "&amp;")
"""Signs of markup from chat templates or HTML, which people do not write."""


def note_oddities(record: Record, dropped: Counter[str]) -> None:
    """Count what looks odd in a record: a reply that begins with its prompt, markup, texts that are JSON lists."""
    first = record.completions[0]
    turns, reply = turns_of(record.prompt), "" if first.turns else first.text
    question = next((turn.content for turn in reversed(turns) if turn.role == "user"), "")
    if reply[:1] == question[:1] and len(question) > 10 and reply.startswith(question.strip()):
        dropped[f"{NOTED}replies that repeat their prompt"] += 1
    for text in (question, reply):
        if any(mark in text for mark in MARKUP):
            dropped[f"{NOTED}texts with markup of a chat template or of HTML"] += 1
        if text[:2] == '["' and text[-2:] == '"]':
            dropped[f"{NOTED}texts that are JSON lists"] += 1
