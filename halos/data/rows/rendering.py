"""Renders conversations by the tokenizer's chat template: the only place that does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from halos.data.records.record import Conversation, Prompt, Reply, messages_of, turns_of_reply
from halos.data.rows.templates import PLAIN_TEMPLATE, Template, chosen, control_of, with_date, without_control

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, object]
"""A turn as templates read it: ``role``, ``content`` and whatever else the template knows."""

_SENTINEL = "halos-sentinel"
_SOME_TOOL = ({"type": "function", "function": {"name": "f", "description": "", "parameters": {}}},)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What a chat template reads in addition to the turns.

    Attributes:
        tools: descriptions of the tools that the model may call (JSON schemas), or None.
        kwargs: values of other variables of the template, such as ``enable_thinking``.
    """

    tools: Sequence[Mapping[str, object]] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """A conversation to render: its place for errors, its turns, and what the template reads in addition to them."""

    where: str
    turns: tuple[Turn, ...]
    format: ChatFormat = ChatFormat()

    def then(self, reply: Reply) -> Request:
        """Return the request with a reply after it."""
        turns = (turn.as_dict() for turn in turns_of_reply(reply))
        return Request(self.where, (*self.turns, *turns), self.format)

    def with_values(self, values: Mapping[str, object]) -> Request:
        """Return the request with these values of the template's variables."""
        return replace(self, format=replace(self.format, kwargs={**self.format.kwargs, **values}))


_PLAIN = ChatFormat()


@lru_cache(maxsize=256)
def _format_of(tools: str, template_kwargs: str) -> ChatFormat:
    # Cached: conversations with equal tools are rendered in one call, and their JSON is parsed once.
    return ChatFormat(json.loads(tools) if tools else None, json.loads(template_kwargs) if template_kwargs else {})


def request_of(prompt: Prompt, where: str = "prompt") -> Request:
    """Return a prompt as a request; a text is a single user turn."""
    form = _format_of(prompt.tools, prompt.template_kwargs) if isinstance(prompt, Conversation) else _PLAIN
    return Request(where, tuple(one.as_dict() for one in messages_of(prompt)), form)


@lru_cache(maxsize=1)
def today() -> date:
    """The day of this process's first call, so that a run past midnight keeps one date."""
    return date.today()


class Renderer:
    """Renders conversations as transformers and servers do.

    Args:
        tokenizer: has the chat template; without one, :data:`PLAIN_TEMPLATE` takes its place.

    Attributes:
        template: the template (or several by name) that is rendered, with the date that it writes.
        control: the control token with which an exported template ends its generation prompt (CSFT), or nothing. It
            follows every prompt, and no reply has it, so it is not rendered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        chat_template: Template | None = tokenizer.chat_template
        template: Template = PLAIN_TEMPLATE if chat_template is None else with_date(chat_template, today())
        self.control = control_of(template)
        self.template: Template = without_control(template, self.control)

    def prompts(self, conversations: Sequence[Request]) -> list[str]:
        """Render conversations with the generation prompt after them, but without :attr:`control`.

        Raises:
            ValueError: the template refuses the turns of a conversation; the error begins with its place.
        """
        return self._render(conversations, generation_prompt=True)

    def wholes(self, conversations: Sequence[Request]) -> list[str]:
        """Render conversations that end with a reply. Raises ``ValueError`` as :meth:`prompts` does."""
        return self._render(conversations, generation_prompt=False)

    def _render(self, conversations: Sequence[Request], *, generation_prompt: bool) -> list[str]:
        places: dict[int, list[int]] = {}
        for n, one in enumerate(conversations):
            places.setdefault(id(one.format), []).append(n)
        texts: dict[int, str] = {}
        for group in places.values():
            texts.update(zip(group, self._of_format([conversations[n] for n in group], generation_prompt), strict=True))
        return [texts[n] for n in range(len(conversations))]

    def _of_format(self, conversations: list[Request], generation_prompt: bool) -> list[str]:
        try:
            return self._apply([list(one.turns) for one in conversations], conversations[0].format, generation_prompt)
        except Exception:
            # The error does not say which conversation it is about; rendering them one by one names it.
            return [self._one(one, generation_prompt) for one in conversations]

    def _one(self, conversation: Request, generation_prompt: bool) -> str:
        try:
            return self._apply([list(conversation.turns)], conversation.format, generation_prompt)[0]
        except Exception as error:  # a template can raise anything (jinja's TemplateError among others)
            roles = ", ".join(str(turn["role"]) for turn in conversation.turns)
            raise ValueError(f"{conversation.where}: the chat template refused the turns {roles}: {error}") from error

    def _apply(self, conversations: list[list[Turn]], form: ChatFormat, generation_prompt: bool) -> list[str]:
        tools: list[Any] | None = None if form.tools is None else [dict(tool) for tool in form.tools]
        # As text, not as ids, as prompt and completion are tokenised so that the boundary stays between them.
        texts = self.tokenizer.apply_chat_template(
            cast("list[list[dict[str, str]]]", conversations),
            tools=tools,
            chat_template=chosen(self.template, tools=tools is not None),
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **form.kwargs,
        )
        return list(texts)


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, reply: Reply | None = None, *, where: str = "prompt"
) -> str:
    """Render one prompt with its generation prompt, or with a reply; see :class:`Renderer`."""
    renderer, request = Renderer(tokenizer), request_of(prompt, where)
    if reply is not None:
        return renderer.wholes([request.then(reply)])[0]
    return renderer.prompts([request])[0] + renderer.control


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes around a plain reply.

    Attributes:
        opening: the text between the generation prompt and the reply (an empty think block, a channel header).
        after: the text after the reply.
        closing: the part of ``after`` before the token that ends the turn.
        end_text: that token's text; empty if the template ends turns with no token.
        end: the id of the token that ends a turn: that of the template, else the tokenizer's EOS.
        ends: a pattern of the tokens that can end a turn.
    """

    opening: str
    after: str
    closing: str
    end_text: str
    end: int
    ends: re.Pattern[str]

    def cut(self, text: str) -> tuple[str, str]:
        """Cut what a template wrote after a prompt at the end of its last turn.

        Returns:
            The completion's text without the token that ends it, and that token's text. Where the latter is empty,
            the template ends the turn with no token, and :attr:`end` follows the text.
        """
        if self.after and text.endswith(self.after):
            return text.removesuffix(self.after) + self.closing, self.end_text
        tokens = list(self.ends.finditer(text)) if self.end_text else []
        # Another kind of turn, such as a tool call, may be closed by another token, with nothing after it.
        last = [token for token in tokens if not text[token.end() :].strip()]
        last = last or [token for token in tokens if token[0] == self.end_text]
        return (text[: last[-1].start()], last[-1][0]) if last else (text, "")


def frame_of(renderer: Renderer) -> Frame:
    """Find what the template writes around a reply, by rendering a reply whose text cannot occur in a template.

    Raises:
        ValueError: there is neither a token with which the template closes a turn nor an EOS token, or the template
            refuses a single user turn.
    """
    closing = end_text = ""
    tokenizer = renderer.tokenizer
    special = special_tokens(tokenizer)
    end, ends = tokenizer.eos_token_id, pattern_of(special)
    opening, after, shared = _around(renderer)
    # Some models end turns with a token that is not marked as special.
    tokens = ends if ends.search(after) else pattern_of(added_tokens(tokenizer))
    if token := _end_of(shared, tokens, opening, tokenizer.eos_token) or tokens.search(after):
        closing, end_text = after[: token.start()], token[0]
        end, ends = tokenizer.convert_tokens_to_ids(end_text), pattern_of({*special, end_text})
    if end is None:
        raise ValueError(
            "tokenizer: expected a token that ends a turn, found none; set an eos_token, or a chat template that "
            "closes the assistant's turn with a special token"
        )
    return Frame(opening, after, closing, end_text, int(end), ends)


def _around(renderer: Renderer) -> tuple[str, str, str]:
    """Return the text before a reply, the text after it, and the part of the latter that another turn can follow."""
    chosen(renderer.template)  # raises where none of several is the default
    user = request_of("a", "model.chat_template")
    try:
        prompt = renderer.prompts([user])[0]
    except ValueError:  # a template may be for requests with tools alone
        user = replace(user, format=ChatFormat(_SOME_TOOL))
        prompt = renderer.prompts([user])[0]
    replied = user.then(_SENTINEL)
    before, sentinel, after = renderer.wholes([replied])[0].rpartition(_SENTINEL)
    if not sentinel:
        return "", "", ""
    try:
        _, _, later = renderer.wholes([replace(replied, turns=(*replied.turns, *user.turns))])[0].rpartition(_SENTINEL)
    except ValueError:
        later = after
    opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
    return opening, after, after[: common_length(after, later)]


def _end_of(text: str, ends: re.Pattern[str], opening: str, eos: str | None) -> re.Match[str] | None:
    """Return the token that ends a turn in the text after it: EOS, else the first that does not also begin replies."""
    # A template may close parts of a turn too (a response in a turn), with tokens at which no server stops.
    tokens = list(ends.finditer(text))
    choices = [token for token in tokens if token[0] == eos] + [token for token in tokens if token[0] not in opening]
    return next(iter(choices or tokens), None)


def common_length(one: str, other: str) -> int:
    """Return the number of characters with which both texts begin."""
    shorter = min(len(one), len(other))
    return next((n for n in range(shorter) if one[n] != other[n]), shorter)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the texts of all special tokens."""
    # Not every special token has a name in the tokenizer's config: all_special_tokens alone misses Phi-3's <|end|>.
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return special.union(map(str, tokenizer.all_special_tokens))


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the texts of all tokens that are found in a text before it is tokenised."""
    return {token.content for token in tokenizer.added_tokens_decoder.values()}


def pattern_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches each of the texts, the longest first; texts of white space alone are ignored."""
    longest_first = sorted((text for text in texts if text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
