"""From a row and the roles of its columns to a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from halos.data.layouts.chats import (
    ROLE_NAMES,
    chat_of,
    common_prompt,
    conversation_in,
    conversation_of,
    diverging,
    history_of,
    looks_like_transcript,
    trained_turns,
    transcript_of,
    with_turns,
)
from halos.data.layouts.recognise import missing_prompt
from halos.data.layouts.roles import COMMON_ROLES, ROLES_OF, Declaration, Path, Roles, has_content, kind_of, value_at
from halos.data.layouts.values import number_in, plain_word, score_in
from halos.data.layouts.votes import DISAGREE, UNDECIDED, counted_votes, vote_count
from halos.data.reading.context import in_context
from halos.data.reading.fields import (
    RawRow,
    has,
    keys_of,
    messages_of,
    prompt_of,
    reply_of,
    required,
    shorten,
    text_of,
    wrong,
)
from halos.data.records.record import (
    Completion,
    Message,
    Prompt,
    Record,
    Reply,
    messages_of as turns_of,
    prompt_key,
    reply_text,
    turns_of_reply,
)
from halos.data.sources.adapted import DIFFERENT_PROMPTS, FILTERED, NOTED, by_rank, without_empty

COMPLETION_KEYS = {"text", "messages", "desirable", "score"}
CONTEXT = ("system", "tools", "chat_template_kwargs")
TIE = f"{FILTERED}ties (data.ties=keep keeps them)"
NO_WEIGHT = f"{FILTERED}records with weight 0"
NO_VERDICT = f"{FILTERED}rows whose label says nothing (data.values.tie)"
Preferences = tuple[tuple[int, int], ...]
TextOrTurns = str | tuple[Message, ...]


class Converter:
    """Makes records of rows whose columns play the same roles.

    Args:
        roles: the columns of each role.
        declaration: what the user says about values, roles of messages, ties and transcripts.
    """

    def __init__(self, roles: Roles, declaration: Declaration) -> None:
        self.roles, self.declaration, self.values = roles, declaration, declaration.values
        self.role_names = {**ROLE_NAMES, **declaration.roles}
        kinds: dict[str, Callable[[str, RawRow, Counter[str]], Record | None]] = {
            "completions": self._listed,
            "sides": self._compared,
            "chosen": self._preferred,
            "completion": self._single,
        }
        self._context = [name for name in CONTEXT if name in roles]
        self._is_weighed = "weight" in roles or "margin" in roles
        kind = kind_of(roles)
        self._convert = kinds.get(kind, self._conversation)
        if unused := [role for role in declaration.columns if role not in (kind, *COMMON_ROLES, *ROLES_OF[kind])]:
            raise ValueError(
                f"data.columns.{unused[0]}: expected a role of rows with {kind} ({', '.join(ROLES_OF[kind])}), found "
                f"{roles[unused[0]]!r}, which would not be used"
            )

    def __call__(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        """Return the record of a row, None if nothing is left of it.

        Args:
            where: the location of the row.
            row: the row.
            dropped: receives counts of what is left out and of what is converted.

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

    # Parts of a row

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

    def _reply(self, where: str, row: RawRow, path: Path, own: TextOrTurns | None) -> tuple[tuple[Message, ...], Reply]:
        """Return (the turns before a completion in its own column, the completion).

        Where the row has a prompt of its own, turns that begin with the assistant's are the completion, all of them.
        """
        value = chat_of(value_at(row, path), self.role_names)
        if value is None:
            required(where, row, path)
        if self.declaration.split_transcripts and isinstance(value, str) and (turns := conversation_in(value)):
            return turns[:-1], turns[-1].content
        before, reply = reply_of(where, {path: value}, path)
        if own is not None and before and before[0].role == "assistant":
            return (), (*before, *turns_of_reply(reply))
        return before, reply

    def _agreed(
        self, where: str, path: Path, own: TextOrTurns | None, before: tuple[Message, ...]
    ) -> TextOrTurns | None:
        """Return the prompt of a completion: the turns before it, or the row's prompt; they have to agree."""
        prompt = before or own
        if before and own is not None:
            check_agreement(where, path, own, before)
        return prompt

    def _score(self, where: str, row: RawRow, path: Path | None) -> float | None:
        return None if path is None else score_in(where, path, value_at(row, path))

    def _weighed(self, where: str, row: RawRow, record: Record, dropped: Counter[str]) -> Record | None:
        """Return the record with its row's weight and margin, None where the weight is 0."""
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

    # Kinds of rows

    def _single(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        own = self._prompt(where, row, dropped)
        path, _ = self._required(where, row, "completion")
        before, reply = self._reply(where, row, path, own)
        prompt = self._agreed(where, path, own, before)
        if prompt is None:
            raise missing_prompt(where, row, self.roles)
        return self._judged(where, row, prompt, reply, dropped)

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
        self, where: str, row: RawRow, prompt: TextOrTurns, reply: Reply, dropped: Counter[str]
    ) -> Record | None:
        """Return the record of one reply with what was said of it; None where its votes do not decide."""
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
        record = self._weighed(where, row, Record(where, prompt, (completion,)), dropped)
        return record and replace(record, weight=record.weight * vote_weight)

    def _votes(self, where: str, row: RawRow) -> tuple[int, int] | None:
        """Return the numbers of votes for desirable and undesirable; None where nobody voted."""
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

    def _preferred(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        own = self._prompt(where, row, dropped)
        paths = [self._required(where, row, role)[0] for role in ("chosen", "rejected")]
        (before, chosen), (before_rejected, rejected) = (self._reply(where, row, path, own) for path in paths)
        prompt, other = before or own, before_rejected or own
        if prompt is None or other is None:
            text, chosen, rejected = common_prompt(where, reply_text(chosen), reply_text(rejected))
            dropped[f"{NOTED}prompts that are the common start of both sides"] += 1
            prompt = other = self._with_history(where, row, text)
        compared = one_prompt((prompt, chosen), (other, rejected))
        if compared is None:
            dropped[DIFFERENT_PROMPTS] += 1
            return None
        prompt, chosen, rejected = compared
        if own is not None:
            check_agreement(where, paths[0], own, prompt)
        if isinstance(own, tuple) and isinstance(self._value(row, "prompt"), str):
            # The space after "Assistant:" belongs to the transcript.
            chosen, rejected = (reply.strip() if isinstance(reply, str) else reply for reply in (chosen, rejected))
        scores = [self.roles.get(role) for role in ("score_chosen", "score_rejected")]
        completions = tuple(
            Completion.of(reply, score=self._score(where, row, path if isinstance(path, str) else None))
            for reply, path in zip((chosen, rejected), scores, strict=True)
        )
        return self._weighed(where, row, Record(where, prompt, completions, ((0, 1),)), dropped)

    def _compared(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        sides = self._pair_of_paths("sides")
        own = self._prompt(where, row, dropped)
        replies = [self._reply(where, row, side, own) for side in sides]
        prompts = [self._agreed(where, side, own, before) for side, (before, _) in zip(sides, replies, strict=True)]
        if prompts[0] is None or prompts[1] is None:
            raise missing_prompt(where, row, self.roles)
        compared = one_prompt((prompts[0], replies[0][1]), (prompts[1], replies[1][1]))
        if compared is None:
            dropped[DIFFERENT_PROMPTS] += 1
            return None
        paths = self._pair_of_paths("scores") if "scores" in self.roles else (None, None)
        scores = [self._score(where, row, path) for path in paths]
        preferences = self._winner(where, row, sides, scores, dropped)
        if preferences is None:
            return None
        prompt, *both = compared
        completions = tuple(Completion.of(reply, score=score) for reply, score in zip(both, scores, strict=True))
        return self._weighed(where, row, Record(where, prompt, completions, preferences), dropped)

    def _pair_of_paths(self, role: str) -> tuple[Path, Path]:
        paths = self.roles[role]
        return paths[0], paths[1]

    def _winner(
        self, where: str, row: RawRow, sides: tuple[Path, Path], scores: Sequence[float | None], dropped: Counter[str]
    ) -> Preferences | None:
        """Return the preference between two sides; None for a tie that is left out."""
        column = self.roles.get("winner")
        if column is None:
            if None in scores:
                raise ValueError(
                    f"{where}: expected a column that says which of {sides[0]!r} and {sides[1]!r} is better, or their "
                    f"scores; found {keys_of(row)}; name it with data.columns.winner=… or data.columns.scores=[…]"
                )
            return ()
        if isinstance(column, str):
            place = self._winner_in(where, row, column, sides, dropped)
        else:
            won = [self.values.label(where, path, value_at(row, path)) for path in column]
            if sum(won) > 1:
                raise ValueError(
                    f"{where}: expected one winner, found {', '.join(column[n] for n, w in enumerate(won) if w)}"
                )
            place = tuple(n for n, has_won in enumerate(won[:2]) if has_won)
        if place:
            return ((0, 1),) if place == (0,) else ((1, 0),)
        if self.declaration.keep_ties:
            return ()
        dropped[TIE] += 1
        return None

    def _winner_in(
        self, where: str, row: RawRow, column: Path, sides: tuple[Path, Path], dropped: Counter[str]
    ) -> tuple[int, ...]:
        value = value_at(row, column)
        if value is None:
            required(where, row, column)
            raise wrong(where, column, "given", None)
        # HALOs' pairwise feedback: 1 says that A is preferred, 0 that B is.
        if column in ("label", "labels") and sides[0][-1:] in "aA" and plain_word(value) in ("1", "0", "true", "false"):
            return (0,) if plain_word(value) in ("1", "true") else (1,)
        numbers = [side[-1:] for side in sides]
        if isinstance(value, float) and all(n.isdigit() for n in numbers) and not value.is_integer():
            low, high = map(int, numbers)
            if low < value < high:
                dropped[f"{NOTED}soft preferences rounded"] += 1
                return () if value - low == high - value else (0,) if value - low < high - value else (1,)
        return self.values.winner(where, column, value, sides)

    def _listed(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        path, items = self._required(where, row, "completions")
        item_name = self.roles.get("text")
        if not isinstance(items, list) or not items:
            raise wrong(where, path, "a list of objects with 'text'", items)
        prompt = self._prompt(where, row, dropped)
        if prompt is None:
            raise missing_prompt(where, row, self.roles)
        if path == "output" and item_name is None:
            texts = [text_of(where, f"{path}[{n}]", text) for n, text in enumerate(items)]
            record = Record(where, prompt, tuple(map(Completion, texts)), by_rank(range(len(texts))))
            return self._weighed(where, row, record, dropped)
        own_format = path == "completions" and item_name in (None, "text") and not isinstance(items[0], str)
        items = self._with_lists(where, row, path, items)
        completions = tuple(self._item(where, f"{path}[{n}]", item, own_format) for n, item in enumerate(items))
        preferences = _preferences(where, self._value(row, "preferences")) + self._by_rank(where, path, items)
        preferences += self._best_of(where, row, completions)
        record = Record(where, prompt, completions, preferences)
        name = self._value(row, "id")
        if own_format and name is not None:
            record_id = text_of(where, "id", name)
            if not record_id.strip():
                raise wrong(where, "id", "a name", name)
            # Only now: the errors of the record's own checks name the file and the line, which help more than its id.
            record = replace(record, id=record_id)
        return self._weighed(where, row, record, dropped)

    def _with_lists(self, where: str, row: RawRow, path: Path, items: Sequence[object]) -> list[object]:
        """Return texts as objects with what columns with a list say of each; other items as they are."""
        if not all(isinstance(item, str) for item in items):
            return list(items)
        objects: list[dict[str, object]] = [{self._key("text"): text} for text in items]
        for role in ("score", "rank", "label"):
            name = self.roles.get(role)
            if not isinstance(name, str):
                continue
            values = value_at(row, name)
            if not isinstance(values, list) or len(values) != len(items):
                raise wrong(
                    where, name, f"a list with one value for each of the {len(items)} texts in {path!r}", values
                )
            for item, value in zip(objects, values, strict=True):
                item[self._key(role)] = value
        return list(objects)

    def _key(self, role: str) -> Path:
        """Return the key, or the path, under which the items of a list have a role."""
        return str(self.roles.get(role, "desirable" if role == "label" else role))

    def _best_of(self, where: str, row: RawRow, completions: Sequence[Completion]) -> Preferences:
        """Return the preferences of the best of a list, named by its index from 0 or by its text, to all others."""
        if "winner" not in self.roles:
            return ()
        path, value = self._required(where, row, "winner")
        texts = [completion.text for completion in completions]
        number = number_in(value) if isinstance(value, str) and value not in texts else value
        best = texts.index(value) if value in texts else number
        if isinstance(best, bool) or not isinstance(best, int | float) or best not in range(len(texts)):
            raise wrong(where, path, f"the index of the best completion, 0 to {len(texts) - 1}, or its text", value)
        return tuple((int(best), other) for other in range(len(texts)) if other != best)

    def _item(self, where: str, name: str, item: object, own_format: bool) -> Completion:
        text = self._key("text")
        found = value_at(item, text) if isinstance(item, Mapping) else None
        if not isinstance(item, Mapping) or (found is not None) == (own_format and has(item, "messages")):
            raise wrong(where, name, f"an object with {text!r}" + (" or 'messages'" if own_format else ""), item)
        unknown = sorted(set(item) - COMPLETION_KEYS) if own_format and "rank" not in self.roles else []
        # A mistyped 'desirable' would otherwise pass for a completion without feedback.
        if unknown:
            raise ValueError(
                f"{where}: expected {name!r} to have 'text' (or 'messages'), 'desirable' and 'score' only; "
                f"found {shorten(unknown[0])}"
            )
        place, value = (f"{name}.messages", item["messages"]) if found is None else (f"{name}.{text}", found)
        reply: Reply
        if found is not None and not isinstance(found, list | dict):
            reply = text_of(where, place, found)
        else:
            reply = messages_of(where, place, chat_of(value, self.role_names))
            if not reply[-1].weight:
                raise wrong(where, f"{place}[{len(reply) - 1}].weight", "1, as the last turn is judged", 0)
        label, score = (value_at(item, self._key(role)) for role in ("label", "score"))
        return Completion.of(
            reply,
            desirable=None if label is None else self.values.label(where, f"{name}.{self._key('label')}", label),
            score=score_in(where, f"{name}.{self._key('score')}", score),
        )

    def _by_rank(self, where: str, path: Path, items: Sequence[object]) -> Preferences:
        """Return a preference for every two items with different ranks; rank 1 is the best."""
        key = self.roles.get("rank")
        if key is None:
            return ()
        ranks = [
            score_in(where, f"{path}[{n}].{key}", value_at(item, str(key)) if isinstance(item, Mapping) else None)
            for n, item in enumerate(items)
        ]
        return by_rank(ranks)


def one_prompt(
    one: tuple[TextOrTurns, Reply], other: tuple[TextOrTurns, Reply]
) -> tuple[TextOrTurns, Reply, Reply] | None:
    """Return the prompt of two completions, and the completions.

    Where conversations are compared, not replies to one prompt, it is what both begin with, before an assistant turn.

    Args:
        one: the prompt and the reply of one side.
        other: those of the other side.

    Returns:
        None if the conversations have no common beginning.
    """
    (prompt, reply), (prompt_of_other, reply_of_other) = one, other
    several = any(len(turns_of_reply(own)) > 1 for own in (reply, reply_of_other))
    if prompt_key(prompt) == prompt_key(prompt_of_other) and not several:
        return prompt, reply, reply_of_other
    wholes = [(*turns_of(start), *turns_of_reply(end)) for start, end in (one, other)]
    parted = diverging(*wholes)
    if parted is None:
        return None
    start, mine, theirs = parted
    # A text as prompt stays one.
    return (prompt if prompt_key(prompt) == prompt_key(start) else start), mine, theirs


MARKUP = ("<|", "[INST]", "<start_of_turn>", "<br", "</p>", "&nbsp;", "&quot;", "&amp;")
"""Beginnings of what chat templates and HTML write, and people do not."""


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


def check_agreement(where: str, key: str, prompt: Prompt, turns: Prompt) -> None:
    """Raise ``ValueError`` unless the turns before a completion repeat the prompt of the row.

    The prompt may also be the beginning of these turns. One that is a text may repeat the first user turn only, as
    UltraFeedback's does.
    """
    own = turns_of(prompt)
    if prompt_key(prompt) == prompt_key(tuple(turns_of(turns))[: len(own)]):
        return
    question = next((message.content for message in turns_of(turns) if message.role == "user"), None)
    if isinstance(prompt, str) and question is not None and question.strip() == prompt.strip():
        return
    raise ValueError(
        f"{where}: expected {key!r} to be one assistant message, or the conversation that 'prompt' starts; "
        "found other turns before the completion"
    )


def _preferences(where: str, value: object) -> Preferences:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise wrong(where, "preferences", "a list of [better, worse]", value)
    for i, pair in enumerate(value):
        # By type: true and false are the indices 1 and 0 to Python.
        if not isinstance(pair, list) or [type(index) for index in pair] != [int, int]:
            raise wrong(where, f"preferences[{i}]", "two indices [better, worse]", pair)
    return tuple((better, worse) for better, worse in value)
