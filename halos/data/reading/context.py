"""What a row has beside its prompt: a system text, tools, variables of the chat template, and what cannot be used."""

from __future__ import annotations

from halos.data.reading.fields import RawRow, check_text_alone, has, json_of, text_of, without_null, wrong
from halos.data.reading.json_files import parse_json
from halos.data.records.record import Conversation, Message, Prompt, messages_of, with_messages

RESERVED = frozenset(
    [
        *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
        *("return_assistant_tokens_mask", "sanitize_control_tokens"),
    ]
)
"""Arguments of ``apply_chat_template`` that are not variables of the template."""


def in_context(where: str, row: RawRow, prompt: Prompt) -> Prompt:
    """Return the prompt with the system text, the tools and the template variables of its row.

    Args:
        where: the location of the row.
        row: its keys ``system``, ``tools`` and ``chat_template_kwargs`` are read.
        prompt: the prompt of the row's record.

    Raises:
        ValueError: a value is malformed, the prompt has another system text, or the row has images, videos or audio.
    """
    check_text_alone(where, row)
    if has(row, "system"):
        prompt = _with_system(where, prompt, text_of(where, "system", row["system"]))
    tools, variables = _tools(where, row.get("tools")), _variables(where, row.get("chat_template_kwargs"))
    return Conversation(tuple(messages_of(prompt)), tools, variables) if tools or variables else prompt


def _with_system(where: str, prompt: Prompt, system: str) -> Prompt:
    if not system.strip():
        return prompt
    turns = tuple(messages_of(prompt))
    if turns[0].role != "system":
        return with_messages(prompt, (Message("system", system), *turns))
    if turns[0].content.strip() != system.strip():
        raise wrong(where, "system", "the text of the prompt's system turn, or absent", system)
    return prompt


def _tools(where: str, value: object) -> str:
    tools = _parsed(where, "tools", value)
    if tools is None:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise wrong(where, "tools", "a list of objects, or a JSON text of one", value)
    return json_of(where, "tools", tools)


def _variables(where: str, value: object) -> str:
    variables = _parsed(where, "chat_template_kwargs", value)
    if variables is None:
        return ""
    if not isinstance(variables, dict):
        raise wrong(where, "chat_template_kwargs", "an object, or a JSON text of one", value)
    if taken := sorted(RESERVED.intersection(variables)):
        raise wrong(where, "chat_template_kwargs", f"without {taken[0]!r}, which halos sets itself", value)
    return json_of(where, "chat_template_kwargs", variables)


def _parsed(where: str, name: str, value: object) -> object:
    """Return a value, parsed if it is a text; None for a text of white space."""
    if not isinstance(value, str):
        return without_null(value)
    # A text keeps its nulls: it was written as it is, while a table fills in nulls.
    return parse_json(f"{where}: {name}", value) if value.strip() else None
