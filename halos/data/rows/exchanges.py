"""Prompts with their replies as texts and token ids, by one rule: see README.md in this folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

from halos.data.records.record import Prompt, Reply
from halos.data.rows.boundary import Boundary, Context
from halos.data.rows.refusals import Refusal, differing
from halos.data.rows.rendering import Frame, Renderer, Request, pattern_of, request_of, special_tokens
from halos.data.rows.switches import helpful_value

Shape = tuple[str, str]
"""A key of what a template writes around a reply and before it, and how it treats white space around the reply:
``kept``, ``trimmed``, or ``""`` where the reply has none."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One prompt with the replies to it.

    Attributes:
        where: the place in the data, for errors.
        prompt: text or turns.
        replies: the replies.
        control: text that ends the prompt (a control token of CSFT).
    """

    where: str
    prompt: Prompt
    replies: tuple[Reply, ...] = ()
    control: str = ""


@dataclass(slots=True)
class Tokenised:
    """Token ids of an exchange.

    Attributes:
        prompt: ids of the prompt, the control text not among them.
        completions: ids of each completion; of one that was refused, its end alone.
        shapes: see :data:`Shape`; None where the ids of a completion may depend on the whole prompt.
        refusals: why completions were refused.
    """

    prompt: list[int]
    completions: list[list[int]] = field(default_factory=list)
    shapes: list[Shape | None] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


@dataclass(slots=True)
class _Completion:
    """The text of a completion, without the token that ends it, and where its ids belong."""

    owner: Tokenised
    context: Context
    text: str
    end: str


class Exchanges:
    """Tokenises exchanges.

    Args:
        renderer: writes conversations.
        boundary: tokenises.
        frame: what the template writes around a plain reply.
        bos: the BOS that the tokenizer puts before plain text, as a list of one or no id.
        rendered: prompts and completions are texts that carry their markup already.
    """

    def __init__(self, renderer: Renderer, boundary: Boundary, frame: Frame, bos: list[int], *, rendered: bool) -> None:
        self.renderer, self.boundary, self.frame, self.bos, self.rendered = renderer, boundary, frame, bos, rendered
        tokenizer = renderer.tokenizer
        self.has_template = tokenizer.chat_template is not None and not rendered
        self._control = "" if rendered else renderer.control
        self._bos_text = str(tokenizer.bos_token or "")
        self._markup = pattern_of(() if rendered or tokenizer.split_special_tokens else special_tokens(tokenizer))
        ends = {self.frame.end_text, str(tokenizer.eos_token or "")}
        self._ends = tuple(end for end in ends if end)

    def is_plain(self, prompt: Prompt) -> bool:
        """Whether the prompt is tokenised as it is: a text without a chat template, or one that is rendered."""
        return isinstance(prompt, str) and not self.has_template

    def texts(self, prompts: Sequence[Prompt], where: Sequence[str]) -> dict[Prompt, str]:
        """The text of each prompt as a server renders it, without a control token that the template writes.

        Raises:
            ValueError: the template refuses the turns of a prompt, or the data are rendered and a prompt is not.
        """
        # An error names the first place of a repeated prompt, hence the reversed order.
        places = dict(zip(reversed(prompts), reversed(where), strict=True))
        texts: dict[Prompt, str] = {prompt: prompt for prompt in places if self.is_plain(prompt)}  # type: ignore[misc]
        conversations = {prompt: request_of(prompt, places[prompt]) for prompt in places if prompt not in texts}
        if self.rendered and conversations:
            where = next(iter(conversations.values())).where
            raise ValueError(f"{where}: expected a text as prompt with data.text=rendered, found turns")
        texts.update(zip(conversations, self.renderer.prompts(list(conversations.values())), strict=True))
        return texts

    def tokenise(self, exchanges: Sequence[Exchange]) -> list[Tokenised]:
        """Tokenise exchanges; a prompt that occurs several times is rendered once.

        Raises:
            ValueError: the template refuses the turns of an exchange; the error begins with its place.
        """
        texts = self.texts([one.prompt for one in exchanges], [one.where for one in exchanges])
        ids = dict(zip(texts, self.boundary.encode(list(texts.values())), strict=True))
        control = self.boundary.encode([self._control])[0] if self._control else []
        results = [Tokenised([*self.added_bos(texts[one.prompt]), *ids[one.prompt], *control]) for one in exchanges]
        contexts: dict[tuple[Prompt, str], Context] = {}
        markup: dict[Prompt, str] = {}
        completions: list[_Completion] = []
        refused = False
        for one, result, written in zip(exchanges, results, self._written(exchanges, texts), strict=True):
            text, key = texts[one.prompt], (one.prompt, one.control)
            if key not in contexts:
                contexts[key] = self._context(text, ids[one.prompt], one.control)
            result.refusals = [Refusal("markup", one.where, shown) for shown in self._markup_of(one, markup)]
            for reply, whole in zip(one.replies, written, strict=True):
                body, end = "", ""
                if whole.startswith(text):
                    body, end = self._cut(whole.removeprefix(text), plain=self.is_plain(one.prompt))
                    result.shapes.append(self._shape(contexts[key], reply, body))
                else:
                    # Only the first refusal is shown with what helps.
                    setting = "" if refused else self._helpful_setting(one, reply)
                    refused = True
                    result.refusals.append(Refusal("boundary", one.where, differing(text, whole), setting))
                completions.append(_Completion(result, contexts[key], body, end))
        self._add_ids(completions)
        return results

    def _written(self, exchanges: Sequence[Exchange], texts: dict[Prompt, str]) -> list[list[str]]:
        """The whole text of each prompt with each reply."""
        conversations: list[Request] = []
        for one in exchanges:
            if not self.is_plain(one.prompt):
                conversation = request_of(one.prompt, one.where)
                conversations += [conversation.then(reply) for reply in one.replies]
            elif not all(isinstance(reply, str) for reply in one.replies):
                raise ValueError(f"{one.where}: expected a text as completion of a prompt that is a text, found turns")
        wholes = iter(self.renderer.wholes(conversations))
        return [
            [texts[one.prompt] + str(reply) if self.is_plain(one.prompt) else next(wholes) for reply in one.replies]
            for one in exchanges
        ]

    def _helpful_setting(self, one: Exchange, reply: Reply) -> str:
        """A value of a variable with which the template continues its own prompt, as a setting, or nothing."""

        def continues(values: Mapping[str, bool]) -> bool:
            request = request_of(one.prompt, one.where).given(values)
            prompt, whole = self.renderer.prompts([request])[0], self.renderer.wholes([request.then(reply)])[0]
            return whole.startswith(prompt)

        return helpful_value(str(self.renderer.template), continues)

    def _cut(self, text: str, *, plain: bool) -> tuple[str, str]:
        """Split a completion's text into what comes before the token that ends it, and that token's text."""
        if not plain:
            return self.frame.cut(text)
        stripped = text.rstrip()
        end = next((end for end in self._ends if self.rendered and stripped.endswith(end)), "")
        return (stripped.removesuffix(end), end) if end else (text, "")

    def added_bos(self, text: str) -> list[int]:
        """The BOS before a prompt's ids, as a list of one or no id."""
        # A template, or a text that carries its markup, writes its own BOS; a second one must not be added.
        own = self.has_template or (self.rendered and self._bos_text and text.startswith(self._bos_text))
        return [] if own else self.bos

    def _context(self, text: str, ids: list[int], control: str) -> Context:
        control = self._control + control
        control_ids = self.boundary.encode([control])[0] if control else []
        return self.boundary.context(text + control, ids + control_ids)

    def _markup_of(self, exchange: Exchange, known: dict[Prompt, str]) -> list[str]:
        """Special tokens in the texts of an exchange; ``known``: those of prompts, which occur several times."""
        prompt = exchange.prompt
        if prompt not in known:
            known[prompt] = self._first_token(prompt if isinstance(prompt, str) else request_of(prompt).turns)
        found = {"prompt": known[prompt], "completion": self._first_token(_dicts(exchange.replies))}
        return [f"{token!r} in the {name}" for name, token in found.items() if token]

    def _first_token(self, value: object) -> str:
        return next((token[0] for text in _strings(value) if (token := self._markup.search(text))), "")

    def _shape(self, context: Context, reply: Reply, body: str) -> Shape | None:
        core = reply.strip() if isinstance(reply, str) else ""
        start = len(self.frame.opening) if body.startswith(self.frame.opening) else 0
        kept = body.find(str(reply), start) >= 0
        text = str(reply) if kept else core
        at = body.find(text, start)
        if not (context.safe and core and at >= 0):
            return None
        treatment = "" if core == reply else "kept" if kept else "trimmed"
        return _digest(context.text, body[:at], body[at + len(text) :]), treatment

    def _add_ids(self, completions: Sequence[_Completion]) -> None:
        found = self.boundary.after([one.context for one in completions], [one.text + one.end for one in completions])
        for one, ids in zip(completions, found, strict=True):
            end = cast(int, self.renderer.tokenizer.convert_tokens_to_ids(one.end)) if one.end else self.frame.end
            if not one.end:
                ids = [*ids, end]
            elif ids[-1:] != [end]:  # a tokenizer may split special tokens like any text
                ids = [*self.boundary.after([one.context], [one.text])[0], end]
            one.owner.completions.append(ids)


@lru_cache(maxsize=256)
def _digest(*texts: str) -> str:
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:12]


def _dicts(replies: Sequence[Reply]) -> list[object]:
    return [reply if isinstance(reply, str) else [turn.as_dict() for turn in reply] for reply in replies]


def _strings(value: object) -> Iterator[str]:
    """Every text in nested containers."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner)
