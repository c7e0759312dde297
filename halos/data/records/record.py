"""Feedback records: one prompt, its completions, and what people said of them.

Records are frozen plain Python, without torch, tokenizers or objectives. Everything downstream is derived from them
and never changes one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of :data:`ROLES`.
        content: the text of the turn.
    """

    role: str
    content: str


Prompt = str | tuple[Message, ...]
"""A plain text, or the turns so far, of which the last is not the assistant's."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One reply with its own feedback: a label, a score, both or neither.

    Attributes:
        text: the reply.
        desirable: the label.
        score: the score, a finite number.
    """

    text: str
    desirable: bool | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt with its completions.

    Attributes:
        id: where the record came from (``train.jsonl:12``) or its own id; every error about it begins with this.
        prompt: the prompt.
        completions: at least one.
        preferences: (better, worse) pairs of indices into ``completions``.

    Raises:
        ValueError: if roles, indices or scores make no sense.
    """

    id: str
    prompt: Prompt
    completions: tuple[Completion, ...]
    preferences: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        _check_prompt(self.id, self.prompt)
        if not self.completions:
            raise ValueError(f"{self.id}: expected at least one completion, found none")
        for completion in self.completions:
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
    if not prompt:
        raise ValueError(f"{where}: expected at least one message in the prompt, found none")
    for message in prompt:
        if message.role not in ROLES:
            raise ValueError(f"{where}: expected a role out of {', '.join(ROLES)}; found {message.role!r}")
    # A chat template opens an assistant turn after the prompt, so there would be two in a row.
    if prompt[-1].role == "assistant":
        raise ValueError(
            f"{where}: expected the prompt to end with a user, system or tool turn, found an assistant turn; "
            "move it into the completion"
        )


def prompt_key(prompt: Prompt) -> str:
    """Return a string that is equal exactly for equal prompts; a text equals a lone user turn."""
    # The separators are control characters that no real text has.
    if isinstance(prompt, str):
        return f"user\x1f{prompt}"
    return "\x1e".join(f"{message.role}\x1f{message.content}" for message in prompt)


def messages_of(prompt: Prompt) -> Sequence[Message]:
    """Return the prompt as turns; a plain text is a single user turn."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt
