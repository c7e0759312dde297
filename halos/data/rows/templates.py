"""Chat templates: named ones, and whether one writes a prompt the same way with and without its reply."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halos.data.reading.fields import shorten
from halos.data.records.record import Prompt, messages_of

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""Used for conversations when the tokenizer has no chat template of its own."""

CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEMPLATES = {"plain": PLAIN_TEMPLATE, "chatml": CHATML_TEMPLATE}


def template_of(given: str) -> str:
    """A template by its name, from a file, or as it is (with ``{{`` or ``{%`` in it).

    Raises ``ValueError`` for what is none of these.
    """
    if given in TEMPLATES:
        return TEMPLATES[given]
    if "{{" in given or "{%" in given:
        return given
    file = Path(given).expanduser()
    if not file.is_file():
        raise ValueError(
            f"model.chat_template: expected {', '.join(TEMPLATES)}, a file or a Jinja template, found {given!r}"
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"model.chat_template: {file} cannot be read as text: {error}") from None


def check_prefixes(tokenizer: Any, conversations: Iterable[tuple[str, Prompt, str]]) -> None:
    """Check (id, prompt, completion) triples, one of each sequence of roles, under the tokenizer's chat template.

    The prompt is tokenised by itself and the completion is put behind it; that is what the model will see later only
    if the template writes the prompt the same way whether the reply stands behind it or is still to come. Raises
    ``ValueError`` that shows where it does not.
    """
    if tokenizer.chat_template is None:
        return
    seen: set[tuple[str, ...]] = set()
    for where, prompt, completion in conversations:
        roles = tuple(turn.role for turn in messages_of(prompt))
        if roles not in seen:
            seen.add(roles)
            _check(tokenizer, where, prompt, completion)


def _check(tokenizer: Any, where: str, prompt: Prompt, completion: str) -> None:
    turns = [{"role": turn.role, "content": turn.content} for turn in messages_of(prompt)]
    reply = {"role": "assistant", "content": completion}
    try:
        open_ended = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template([*turns, reply], tokenize=False)
    except Exception as error:  # templates raise whatever they like (jinja's TemplateError among others)
        roles = ", ".join(turn["role"] for turn in turns)
        raise ValueError(f"{where}: the chat template refused the turns {roles}, assistant: {error}") from error
    if whole.startswith(open_ended):
        return
    at = next((n for n, (a, b) in enumerate(zip(open_ended, whole, strict=False)) if a != b), len(whole))
    raise ValueError(
        f"{where}: expected the chat template to write prompt and completion so that they start with the prompt; they "
        f"differ from character {at + 1} on, after {shorten(open_ended[max(0, at - 30) : at])}: "
        f"{shorten(open_ended[at : at + 30])} in the prompt alone, {shorten(whole[at : at + 30])} with the completion; "
        "give another with model.chat_template"
    )
