"""Conversations as files write them: other names for roles, pairs of turns, transcripts, prompts inside of texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from halos.data.reading.fields import messages_of, wrong
from halos.data.records.adapted import FILTERED
from halos.data.records.record import MESSAGE_ROLES, Message

UNTRAINED = f"{FILTERED}conversation without a reply of weight 1"
AFTER_TRAINED = f"{FILTERED}turn after the last reply of weight 1"
ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "function": "tool",
    "developer": "system",
}
"""Other names of roles, from the formats of ShareGPT, OpenAssistant, Gemma, LLaMA-Factory, LangChain and OpenAI."""
ROLE_KEYS = ("role", "from", "type", "speaker", "sender", "author", "user")
CONTENT_KEYS = ("content", "value", "text", "message", "body")
"""Keys of a turn under which its role and its text are looked for."""
TURN = re.compile(r"(?:^|\n)\s*(Human|User|Assistant):[ \t]*", re.MULTILINE)
OPENING = re.compile(r"\s*(Human|User):")
END_OF_SENTENCE = re.compile(r"[.?!:…。？！：]['\"”)]*\s*$|\n\s*$")


def chat_of(value: object, role_names: Mapping[str, str]) -> object:
    """Return a list of messages with the keys ``role`` and ``content`` and this project's roles.

    Other keys are renamed: ShareGPT's ``from`` and ``value``, LangChain's ``type``, ``author`` and ``text`` of exported
    chats. A single message becomes a list of one. Everything else is returned as it is; readers of messages say what
    is wrong with it.

    Args:
        value: a list of messages, one message, or anything else.
        role_names: from a role's name in the files to this project's.
    """
    if isinstance(value, dict) and _role_key(value, role_names):
        value = [value]
    if not isinstance(value, list):
        return value
    return [_turn(item, role_names) for item in value]


def conversation_of(value: object, role_names: Mapping[str, str]) -> object:
    """Return a conversation as :func:`chat_of` does, also one that is a transcript, or texts of user and assistant."""
    if isinstance(value, str) and (turns := conversation_in(value)):
        return [turn.as_dict() for turn in turns]
    if isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value):
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(value)]
    return chat_of(value, role_names)


def _role_key(item: Mapping[str, object], role_names: Mapping[str, str]) -> str | None:
    """Return the key of a turn's role: ``role`` or ``from``, or another whose value is the name of a role."""
    for key in ROLE_KEYS:
        if key in item and (
            key in ("role", "from") or role_names.get(_name(item[key]), _name(item[key])) in MESSAGE_ROLES
        ):
            return key
    return None


def _name(value: object) -> str:
    if isinstance(value, dict):  # an author with a name
        value = value.get("name")
    return value if isinstance(value, str) else ""


def _turn(item: object, role_names: Mapping[str, str]) -> object:
    if not isinstance(item, dict):
        return item
    key = _role_key(item, role_names)
    if key is None:
        return item
    role = item[key]
    ours = role_names.get(_name(role), role)
    content_key = next((name for name in CONTENT_KEYS if name in item), "value")
    if ours == role and key == "role" and content_key in ("content", "value"):
        return item
    others = {name: value for name, value in item.items() if name not in (key, content_key)}
    return {"role": ours, "content": item.get(content_key), **others}


def is_chat(value: object) -> bool:
    """Return whether a value is a list of messages, or of ShareGPT's turns."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and bool({"role", "from"} & set(value[0]))
    )


def history_of(where: str, name: str, value: object, role_names: Mapping[str, str]) -> tuple[Message, ...]:
    """Return the turns before a prompt: a list of [user, assistant] pairs, or messages.

    Raises:
        ValueError: it is neither.
    """
    if is_chat(value):
        return messages_of(where, name, chat_of(value, role_names))
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise wrong(where, name, "a list of [question, answer] pairs, or of messages", value)
    turns = [
        {"role": role, "content": text}
        for pair in value
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return messages_of(where, name, turns) if turns else ()


def transcript_of(text: str) -> tuple[Message, ...] | None:
    """Split a transcript ``Human: … Assistant:`` into the turns before the last marker.

    Returns:
        The turns, or None unless the text begins with a human's marker, the markers alternate at the starts of lines,
        and nothing follows the last marker, which is the assistant's.
    """
    turns = _turns_in(text)
    return None if not turns or turns[-1].content or not all(turn.content for turn in turns[:-1]) else turns[:-1]


def conversation_in(text: str) -> tuple[Message, ...] | None:
    """Split a transcript that ends with a reply of the assistant into turns; None for any other text."""
    turns = _turns_in(text)
    return turns if turns and all(turn.content for turn in turns) else None


def _turns_in(text: str) -> tuple[Message, ...] | None:
    """Return the turns of a transcript in which they alternate, from the human's to the assistant's."""
    if not OPENING.match(text):
        return None
    opening, *rest = TURN.split(text)
    speakers, texts = rest[::2], [turn.strip() for turn in rest[1::2]]
    roles = ["assistant" if speaker == "Assistant" else "user" for speaker in speakers]
    alternates = all(role == ("user", "assistant")[n % 2] for n, role in enumerate(roles))
    if opening.strip() or not alternates or roles[-1] != "assistant":
        return None
    return tuple(Message(role, turn) for role, turn in zip(roles, texts, strict=True))


def looks_like_transcript(text: str) -> bool:
    """Return whether a text has turns of a human and of an assistant in it."""
    if "Assistant:" not in text:  # as in nearly all texts, for which the pattern would be slow
        return False
    speakers = {match == "Assistant" for match in TURN.findall(text)}
    return len(speakers) == 2


def common_prompt(where: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Divide two texts that begin with the same prompt into (prompt, chosen reply, rejected reply).

    The prompt is the common start, cut at a word. It has to end with a sentence or a line, because replies may begin
    with the same words.

    Raises:
        ValueError: there is no such start, or nothing follows it.
    """
    differing = (n for n, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    start = chosen[: next(differing, min(len(chosen), len(rejected)))]
    if any(text[len(start) - 1 : len(start) + 1].isalnum() for text in (chosen, rejected)):
        # A word that both texts only begin alike is part of the replies.
        start = start[: max(start.rfind(" "), start.rfind("\n")) + 1]
    replies = [text[len(start) :].strip() for text in (chosen, rejected)]
    if not start.strip() or not all(replies) or not END_OF_SENTENCE.search(start):
        raise ValueError(
            f"{where}: expected 'prompt' next to 'chosen' and 'rejected', or texts that begin with the same prompt; "
            "where one begins and the other ends is not clear; name the prompt's column with data.columns.prompt=…"
        )
    return start.strip(), replies[0], replies[1]


def diverging(
    one: tuple[Message, ...], other: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]] | None:
    """Divide two conversations into (the turns that both begin with, the rest of one, the rest of the other).

    Both rests begin with an assistant turn. None if there are no such turns, or if one conversation is the beginning of
    the other.
    """
    differing = (n for n, (mine, theirs) in enumerate(zip(one, other, strict=False)) if _key(mine) != _key(theirs))
    start = next(differing, 0)
    while start and not (one[start].role == other[start].role == "assistant" != one[start - 1].role):
        start -= 1
    return (one[:start], one[start:], other[start:]) if start else None


def _key(turn: Message) -> tuple[str, str, str]:
    return turn.role, turn.content, turn.fields  # without the weight, which is not part of what was said


def with_turns(prompt: str | tuple[Message, ...], before: tuple[Message, ...]) -> str | tuple[Message, ...]:
    """Return a prompt with turns before it."""
    if not before:
        return prompt
    return (*before, Message("user", prompt)) if isinstance(prompt, str) else (*before, *prompt)


def trained_turns(messages: object, dropped: Counter[str]) -> object:
    """Return messages up to the last reply whose weight is not 0, None if they end without such a reply."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        return messages  # the reader of messages says what is wrong
    if not messages or messages[-1].get("weight") != 0:
        return messages
    ends = [n for n, turn in enumerate(messages, 1) if turn.get("role") == "assistant" and turn.get("weight") != 0]
    if not ends:
        dropped[UNTRAINED] += 1
        return None
    dropped[AFTER_TRAINED] += len(messages) - ends[-1]
    return messages[: ends[-1]]
