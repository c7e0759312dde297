"""What the prompts and replies of one row have in common."""

from __future__ import annotations

from halos.data.layouts.chats import diverging
from halos.data.records.record import Message, Prompt, Reply, messages_of as turns_of, prompt_key, turns_of_reply

TextOrTurns = str | tuple[Message, ...]


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
    several = any(len(turns_of_reply(side_reply)) > 1 for side_reply in (reply, reply_of_other))
    if prompt_key(prompt) == prompt_key(prompt_of_other) and not several:
        return prompt, reply, reply_of_other
    wholes = [(*turns_of(start), *turns_of_reply(end)) for start, end in (one, other)]
    parted = diverging(*wholes)
    if parted is None:
        return None
    start, mine, theirs = parted
    # A text as prompt stays one.
    return (prompt if prompt_key(prompt) == prompt_key(start) else start), mine, theirs


def check_agreement(where: str, key: str, prompt: Prompt, turns: Prompt) -> None:
    """Raise ``ValueError`` unless the turns before a completion repeat the prompt of the row.

    The prompt may also be the beginning of these turns. One that is a text may repeat the first user turn only, as
    UltraFeedback's does.
    """
    prompt_turns = turns_of(prompt)
    if prompt_key(prompt) == prompt_key(tuple(turns_of(turns))[: len(prompt_turns)]):
        return
    question = next((message.content for message in turns_of(turns) if message.role == "user"), None)
    if isinstance(prompt, str) and question is not None and question.strip() == prompt.strip():
        return
    raise ValueError(
        f"{where}: expected {key!r} to be one assistant message, or the conversation that 'prompt' starts; "
        "found other turns before the completion"
    )
