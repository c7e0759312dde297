"""A check that a chat template writes the tools, calls and thoughts of a conversation instead of leaving them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from halos.data.records.record import Conversation, Message, Prompt, Reply, messages_of, with_messages
from halos.data.rows.rendering import Renderer, request_of
from halos.data.rows.switches import helpful_value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALLS = ("tool_calls", "function_call")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def check_written(
    tokenizer: PreTrainedTokenizerBase, where: str, prompt: Prompt, replies: Sequence[Reply] = ()
) -> None:
    """Check that the text of a conversation depends on its tools, its calls and the thoughts of its replies.

    The thoughts of earlier turns are not checked: many templates leave them out, when serving too.

    Args:
        tokenizer: has the chat template.
        where: the place of the conversation in the data.
        prompt: the prompt.
        replies: its completions.

    Raises:
        ValueError: names what the template does not write.
    """
    if isinstance(prompt, str) and all(isinstance(reply, str) for reply in replies):
        return
    turns = tuple(messages_of(prompt))
    if isinstance(prompt, Conversation) and prompt.tools:
        _check(tokenizer, where, "tools", (prompt, None), (replace(prompt, tools=""), None))
    if _have(turns, CALLS):
        without = with_messages(prompt, _without(turns, CALLS))
        _check(tokenizer, where, "tool_calls", (prompt, None), (without, None))
    for reply in replies:
        if isinstance(reply, str):
            continue
        for names in (CALLS, THOUGHTS):
            if _have(reply, names):
                _check(tokenizer, where, names[0], (prompt, reply), (prompt, _without(reply, names)))


def _check(
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    name: str,
    complete: tuple[Prompt, Reply | None],
    without: tuple[Prompt, Reply | None],
) -> None:
    renderer = Renderer(tokenizer)

    def text(side: tuple[Prompt, Reply | None], values: Mapping[str, bool]) -> str:
        request = request_of(side[0], where).with_values(values)
        return (renderer.prompts([request]) if side[1] is None else renderer.wholes([request.then(side[1])]))[0]

    def writes(values: Mapping[str, bool]) -> bool:
        complete_text = text(complete, values)
        try:
            return complete_text != text(without, values)
        except ValueError:  # a template may refuse an answer of a tool that nobody called; it reads the calls then
            return True

    if not writes({}):
        setting = helpful_value(str(renderer.template), writes)
        raise ValueError(
            f"{where}: expected a chat template that writes {name}, found one whose text is the same without; set "
            f"{f'{setting}, or ' if setting else ''}another template with model.chat_template"
        )


def _have(turns: Iterable[Message], names: tuple[str, ...]) -> bool:
    return any(name in turn.as_dict() for turn in turns if turn.fields for name in names)


def _without(turns: Iterable[Message], names: tuple[str, ...]) -> tuple[Message, ...]:
    return tuple(turn.without(names) for turn in turns)
