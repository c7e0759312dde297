"""Feedback records: one prompt, its completions, and the feedback on them.

Records are frozen plain Python, without torch, tokenizers or objectives. All later stages are derived from them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

MESSAGE_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of :data:`MESSAGE_ROLES`.
        content: the text of the turn.
        fields: a JSON object with all other fields that chat templates read, such as ``tool_calls``; see
            :func:`json_text`.
        weight: 0 for an assistant turn that is not trained on, else 1.
    """

    role: str
    content: str
    fields: str = ""
    weight: int = 1

    @property
    def text(self) -> str:
        """The content, followed by the other fields as JSON: the turn as a reader or a judge sees it."""
        if not self.fields:
            return self.content
        return f"{self.content}\n{self.fields}" if self.content else self.fields

    def as_dict(self) -> dict[str, object]:
        """Return the turn as a chat template takes it."""
        turn: dict[str, object] = {"role": self.role, "content": self.content}
        return turn | json.loads(self.fields) if self.fields else turn

    def without(self, names: Sequence[str]) -> Message:
        """Return the turn without some of its fields."""
        fields = json.loads(self.fields or "{}")
        return replace(self, fields=json_text({name: fields[name] for name in fields if name not in names}))


def json_text(value: Mapping[str, object] | Sequence[object]) -> str:
    """Return fields, tools or template variables as the JSON text that records hold; an empty text if there are none.

    The top-level names are sorted, as their order does not matter. Inside the values the order is kept, because
    templates write objects as they are.
    """
    ordered = dict(sorted(value.items())) if isinstance(value, Mapping) else value
    return json.dumps(ordered, ensure_ascii=False, allow_nan=False) if value else ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt that passes tools or variables to the chat template, in addition to turns.

    Attributes:
        turns: the turns so far, of which the last is not the assistant's.
        tools: a JSON list of the tools that the model may call, or an empty text.
        template_kwargs: a JSON object of further variables of the template (``enable_thinking``), or an empty text.
    """

    turns: tuple[Message, ...]
    tools: str = ""
    template_kwargs: str = ""


Prompt = str | tuple[Message, ...] | Conversation
"""A plain text; the turns so far, of which the last is not the assistant's; or a :class:`Conversation`."""
Reply = str | tuple[Message, ...]
"""The text of a single assistant turn without other fields, or turns that begin and end with an assistant turn."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a reply, which begins where the step before it ends.

    Attributes:
        stop: the place in the reply's text after the step's last character.
        desirable: the label; None for a step without feedback.
    """

    stop: int
    desirable: bool | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One reply with its own feedback: a label, a score, both or neither.

    Attributes:
        text: the reply; for a reply with turns, a rendering for readers and judges.
        desirable: the label.
        score: the score, a finite number.
        turns: the turns of a reply that is more than a text, else empty; :meth:`of` sets text and turns.
        steps: the steps of a reply that is a text, which together cover it; empty if no step has a label.
    """

    text: str
    desirable: bool | None = None
    score: float | None = None
    turns: tuple[Message, ...] = ()
    steps: tuple[Step, ...] = ()

    @classmethod
    def of(cls, reply: Reply, desirable: bool | None = None, score: float | None = None) -> Completion:
        """Return the completion with this reply; a single turn without other fields becomes a text."""
        if isinstance(reply, str) or (len(reply) == 1 and not reply[0].fields):
            return cls(reply if isinstance(reply, str) else reply[0].content, desirable, score)
        return cls(reply_text(reply), desirable, score, reply)

    @property
    def reply(self) -> Reply:
        """The turns if there are any, else the text."""
        return self.turns or self.text


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt with its completions.

    Attributes:
        id: where the record came from (``train.jsonl:12``), or the id that it has in the data. Errors begin with it.
        prompt: the prompt.
        completions: at least one.
        preferences: (better, worse) pairs of indices into ``completions``.
        weight: how much the record counts, above 0; a weight of 2 is the same as having the record twice.
        margin: by how much the better completion of its preferences is preferred, in the data's own unit.

    Raises:
        ValueError: if roles, indices or numbers are invalid.
    """

    id: str
    prompt: Prompt
    completions: tuple[Completion, ...]
    preferences: tuple[tuple[int, int], ...] = ()
    weight: float = 1.0
    margin: float | None = None

    def __post_init__(self) -> None:
        _check_prompt(self.id, self.prompt)
        if not 0 < self.weight < math.inf:
            raise ValueError(f"{self.id}: expected a finite weight above 0, found {self.weight}")
        if self.margin is not None and not math.isfinite(self.margin):
            raise ValueError(f"{self.id}: expected a finite margin, found {self.margin}")
        if not self.completions:
            raise ValueError(f"{self.id}: expected at least one completion, found none")
        for completion in self.completions:
            if completion.turns:
                _check_reply(self.id, completion.turns)
            if completion.steps:
                _check_steps(self.id, completion)
            if completion.score is not None and not math.isfinite(completion.score):
                raise ValueError(f"{self.id}: expected a finite score, found {completion.score}")
        for better, worse in self.preferences:
            if better == worse or not all(0 <= i < len(self.completions) for i in (better, worse)):
                raise ValueError(
                    f"{self.id}: expected a preference between two of the {len(self.completions)} completions, "
                    f"found ({better}, {worse})"
                )


def _check_prompt(where: str, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where}: expected a prompt, found an empty one")
        return
    turns = messages_of(prompt)
    if not turns:
        raise ValueError(f"{where}: expected at least one message in the prompt, found none")
    _check_roles(where, turns)
    # A chat template opens an assistant turn after the prompt, so there would be two in a row.
    if turns[-1].role == "assistant":
        raise ValueError(
            f"{where}: expected the prompt to end with a user, system or tool turn, found an assistant turn; "
            "move it into the completion"
        )


def _check_reply(where: str, turns: tuple[Message, ...]) -> None:
    _check_roles(where, turns)
    for turn in (turns[0], turns[-1]):
        if turn.role != "assistant":
            raise ValueError(f"{where}: expected a reply to begin and end with an assistant turn, found {turn.role!r}")
        if not turn.weight:
            raise ValueError(f"{where}: expected a reply to begin and end with a turn of weight 1, found weight 0")


def _check_steps(where: str, completion: Completion) -> None:
    stops = [0, *(step.stop for step in completion.steps)]
    if completion.turns or stops[-1] != len(completion.text) or any(a >= b for a, b in pairwise(stops)):
        raise ValueError(
            f"{where}: expected steps that end at ascending places of a completion that is a text, the last one at its "
            f"end, found {stops[1:]} in {len(completion.text)} characters{' with turns' if completion.turns else ''}"
        )


def _check_roles(where: str, turns: Sequence[Message]) -> None:
    for turn in turns:
        if turn.role not in MESSAGE_ROLES:
            raise ValueError(f"{where}: expected a role out of {', '.join(MESSAGE_ROLES)}; found {turn.role!r}")


def last_turn(prompt: Prompt) -> str:
    """Return the text of the turn that a reply answers."""
    return messages_of(prompt)[-1].content


def turns_of_reply(reply: Reply) -> tuple[Message, ...]:
    """Return the turns of a reply; a text is one turn of the assistant."""
    return (Message("assistant", reply),) if isinstance(reply, str) else reply


def prompt_characters(prompt: Prompt) -> int:
    """Return the number of characters in a prompt, with its tools and template variables."""
    if isinstance(prompt, str):
        return len(prompt)
    beside = len(prompt.tools) + len(prompt.template_kwargs) if isinstance(prompt, Conversation) else 0
    return beside + sum(len(turn.content) + len(turn.fields) for turn in messages_of(prompt))


def prompt_key(prompt: Prompt) -> str:
    """Return a key that two prompts share only if they are equal; a text equals a single user turn.

    Weights of turns are ignored, because templates do not write them.
    """
    # The separators are control characters that no real text has.
    if isinstance(prompt, str):
        return f"user\x1f{prompt}"
    key = "\x1e".join(map(_turn_key, messages_of(prompt)))
    return f"{key}\x1c{prompt.tools}\x1c{prompt.template_kwargs}" if isinstance(prompt, Conversation) else key


def reply_key(reply: Reply) -> str:
    """Return a key that two replies share only if they are equal."""
    return reply if isinstance(reply, str) else "\x1e".join(("", *map(_turn_key, reply)))


def _turn_key(turn: Message) -> str:
    key = f"{turn.role}\x1f{turn.content}"
    return f"{key}\x1f{turn.fields}" if turn.fields else key


def conversation_key(prompt: Prompt) -> str:
    """Return a key that two prompts share if their conversations agree up to and including the user's first turn."""
    turns = tuple(messages_of(prompt))
    end = next((n for n, turn in enumerate(turns, 1) if turn.role == "user"), len(turns))
    return prompt_key(with_messages(prompt, turns[:end]))


def messages_of(prompt: Prompt) -> Sequence[Message]:
    """Return the prompt as turns; a plain text is a single user turn."""
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    return prompt.turns if isinstance(prompt, Conversation) else prompt


def with_messages(prompt: Prompt, turns: tuple[Message, ...]) -> Prompt:
    """Return the prompt with other turns and the same tools and template variables."""
    return replace(prompt, turns=turns) if isinstance(prompt, Conversation) else turns


def transcript(prompt: Prompt) -> str:
    """Return the prompt as a reader or a judge sees it: its tools, then each turn after its role."""
    turns = [f"{turn.role}: {turn.text}" for turn in messages_of(prompt)]
    tools = [f"tools: {prompt.tools}"] if isinstance(prompt, Conversation) and prompt.tools else []
    return "\n\n".join(tools + turns)


def reply_text(reply: Reply) -> str:
    """Return a reply as a reader or a judge sees it; several turns are each written after their role."""
    if isinstance(reply, str):
        return reply
    return reply[0].text if len(reply) == 1 else transcript(reply)
