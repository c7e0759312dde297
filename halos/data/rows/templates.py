"""Chat templates: named ones, the only place that renders them, and a check that a reply does not change its prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from halos.data.reading.fields import shorten
from halos.data.records.record import Conversation, Message, Prompt, Reply, messages_of
from halos.files import in_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, Any]
"""A turn as a chat template takes it."""
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


def template_of(template: str) -> str:
    """Find a template by its name, read it from a file, or return it as it is.

    Args:
        template: a name in :data:`TEMPLATES`, a file, or a Jinja template (a text with ``{{`` or ``{%`` in it).

    Raises:
        ValueError: it is none of these, or the file is not text.
    """
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{{" in template or "{%" in template:
        return template
    file = in_home(template)
    if not file.is_file():
        raise ValueError(f"model.chat_template: expected {', '.join(TEMPLATES)}, a file or Jinja, found {template!r}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"model.chat_template: expected a text file, but {file} cannot be read as text: {error}"
        ) from None


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, reply: Reply | None = None, *, where: str = "prompt"
) -> str:
    """Render a conversation with the tokenizer's chat template, or with :data:`PLAIN_TEMPLATE` if it has none.

    Args:
        tokenizer: has the chat template.
        prompt: text is a single user turn.
        reply: the assistant's turn after the prompt; None renders the generation prompt in its place.
        where: the place of the prompt in the data, for errors.

    Raises:
        ValueError: the template refuses the turns.
    """
    turns = _turns(prompt)
    if reply is not None:
        turns += [{"role": "assistant", "content": reply}] if isinstance(reply, str) else _dicts(reply)
    try:
        return _apply(tokenizer, [turns], generation_prompt=reply is None, **_context(prompt))[0]
    except Exception as error:  # templates raise whatever they like (jinja's TemplateError among others)
        roles = ", ".join(str(turn["role"]) for turn in turns)
        raise ValueError(f"{where}: the chat template refused the turns {roles}: {error}") from error


def render_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], where: Sequence[str]) -> list[str]:
    """Render many prompts, each with the generation prompt; see :func:`render`."""
    if not prompts:
        return []
    if any(isinstance(prompt, Conversation) for prompt in prompts):  # each has tools and variables of its own
        return [render(tokenizer, prompt, where=place) for prompt, place in zip(prompts, where, strict=True)]
    try:
        return _apply(tokenizer, [_turns(prompt) for prompt in prompts], generation_prompt=True)
    except Exception:
        # The error does not say which prompt it is about; rendering them one by one names it.
        return [render(tokenizer, prompt, where=place) for prompt, place in zip(prompts, where, strict=True)]


def _apply(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[Turn]], *, generation_prompt: bool, **context: Any
) -> list[str]:
    template = PLAIN_TEMPLATE if tokenizer.chat_template is None else None
    # As text, not as ids: ChatTokens tokenises prompt and completion separately, and without a second BOS.
    texts = tokenizer.apply_chat_template(
        # Its annotation knows turns without further fields only.
        cast("list[list[dict[str, str]]]", conversations),
        chat_template=template,
        add_generation_prompt=generation_prompt,
        tokenize=False,
        **context,
    )
    return list(texts)


def _turns(prompt: Prompt) -> list[Turn]:
    return _dicts(messages_of(prompt))


def _dicts(turns: Sequence[Message]) -> list[Turn]:
    return [turn.as_dict() for turn in turns]


def _context(prompt: Prompt) -> dict[str, Any]:
    """The tools and variables of a prompt, as arguments of ``apply_chat_template``."""
    if not isinstance(prompt, Conversation):
        return {}
    variables = json.loads(prompt.template_kwargs) if prompt.template_kwargs else {}
    return {**variables, "tools": json.loads(prompt.tools)} if prompt.tools else variables


def written_reply(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, reply: Reply, where: str = "prompt") -> str:
    """Return the text that the template writes for a reply with turns, without the token that ends it.

    Raises:
        ValueError: the template refuses the turns, or does not continue the prompt.
    """
    if isinstance(reply, str):
        return reply
    _check_prefix(tokenizer, where, prompt, reply)
    after = render(tokenizer, prompt, reply, where=where)[len(render(tokenizer, prompt, where=where)) :]
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    end = max((after.rfind(token) for token in special), default=-1)
    return after if end < 0 else after[:end]


def check_prefixes(tokenizer: PreTrainedTokenizerBase, conversations: Iterable[tuple[str, Prompt, Reply]]) -> None:
    """Check that the chat template writes a prompt the same way with and without a reply after it.

    A row is the tokenised prompt followed by the tokenised completion. The model is served the same text only if the
    template does not rewrite the prompt once a reply follows. One conversation of each sequence of roles is checked.

    Args:
        tokenizer: its chat template is checked; without one there is nothing to check.
        conversations: (id, prompt, completion) of each example.

    Raises:
        ValueError: shows where the two texts differ.
    """
    if tokenizer.chat_template is None:
        return
    seen: set[tuple[str, ...]] = set()
    for where, prompt, completion in conversations:
        # Templates branch on roles, rarely on content; rendering every example twice more would slow preparation.
        roles = tuple(turn.role for turn in messages_of(prompt))
        if roles not in seen:
            seen.add(roles)
            _check_prefix(tokenizer, where, prompt, completion)


def _check_prefix(tokenizer: PreTrainedTokenizerBase, where: str, prompt: Prompt, completion: Reply) -> None:
    alone = render(tokenizer, prompt, where=where)
    with_reply = render(tokenizer, prompt, completion, where=where)
    if with_reply.startswith(alone):
        return
    differing = (n for n, (a, b) in enumerate(zip(alone, with_reply, strict=False)) if a != b)
    at = next(differing, len(with_reply))
    raise ValueError(
        f"{where}: expected the chat template to write prompt and completion so that they start with the prompt; they "
        f"differ from character {at + 1} on, after {shorten(alone[max(0, at - 30) : at])}: "
        f"{shorten(alone[at : at + 30])} in the prompt alone, {shorten(with_reply[at : at + 30])} with the completion; "
        "set another template with model.chat_template"
    )
