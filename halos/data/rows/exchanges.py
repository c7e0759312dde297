"""Prompts with their replies as texts and token ids, by one rule: see README.md in this folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import cast

from halos.data.records.record import Message, Prompt, Reply
from halos.data.rows.boundary import Boundary, Context
from halos.data.rows.refusals import Refusal, differing
from halos.data.rows.rendering import Frame, Renderer, Request, pattern_of, request_of, special_tokens
from halos.data.rows.switches import helpful_value

Shape = tuple[str, str]
"""A key of the text that a template writes before and after a reply, and how it treats white space around the reply:
``kept``, ``trimmed``, or ``""`` where the reply has none."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One prompt with the replies to it.

    Attributes:
        where: the place in the data, for errors.
        prompt: text or turns.
        replies: the replies.
        control: text that ends the prompt (a control token of CSFT).
        stops: places in the text of the one reply; their tokens are looked for (:attr:`Tokenised.stops`).
    """

    where: str
    prompt: Prompt
    replies: tuple[Reply, ...] = ()
    control: str = ""
    stops: tuple[int, ...] = ()


@dataclass(slots=True)
class Tokenised:
    """Token ids of an exchange.

    Attributes:
        prompt: ids of the prompt, the control text not among them.
        completions: ids of each completion; for a refused one, only its end token.
        context: for each completion the spans (start, stop) of its ids that are not scored: turns of others.
        shapes: see :data:`Shape`; None where the ids of a completion may depend on the whole prompt.
        refusals: why completions were refused.
        stops: for each of the exchange's places, how many ids of the completion have their last character before it.
            What the template writes before a reply is before all places but the reply's beginning.
    """

    prompt: list[int]
    completions: list[list[int]] = field(default_factory=list)
    context: list[list[tuple[int, int]]] = field(default_factory=list)
    shapes: list[Shape | None] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a completion: an assistant turn, or the text between two of them.

    Attributes:
        text: its text, without the token that ends it.
        end: the text of that token; empty for a part that ends with none.
        scored: whether it is a turn that is trained on.
    """

    text: str
    end: str
    scored: bool = True


@dataclass(slots=True)
class _Completion:
    """A completion while its ids are collected, part by part.

    Attributes:
        owner: where its ids belong.
        context: the text before the next part.
        parts: its parts.
        stops: places in the text of its one part, see :attr:`Exchange.stops`.
        ids: the ids of the parts so far.
        unscored: the spans of these that are not scored.
    """

    owner: Tokenised
    context: Context
    parts: list[_Part]
    stops: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    unscored: list[tuple[int, int]] = field(default_factory=list)

    def add(self, part: _Part, ids: list[int]) -> None:
        """Append the ids of the next part."""
        if not part.scored:
            span = (len(self.ids), len(self.ids) + len(ids))
            if self.unscored and self.unscored[-1][1] == span[0]:
                span = (self.unscored.pop()[0], span[1])
            self.unscored.append(span)
        self.ids += ids


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
        # Reversed, so that an error names the first place of a repeated prompt.
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
        full_texts = self._written(exchanges, texts)
        turns = self._turns(exchanges)
        for one, result, written in zip(exchanges, results, full_texts, strict=True):
            text, key = texts[one.prompt], (one.prompt, one.control)
            if key not in contexts:
                contexts[key] = self._context(text, ids[one.prompt], one.control)
            result.refusals = [Refusal("markup", one.where, shown) for shown in self._markup_of(one, markup)]
            for reply, full_text in zip(one.replies, written, strict=True):
                parts, several, stops = [_Part("", "")], _several(reply), list[int]()
                own_turns = next(turns) if several else []
                if not full_text.startswith(text):
                    # Only the first refusal is shown with what helps.
                    setting = "" if refused else self._helpful_setting(one, reply)
                    refused = True
                    result.refusals.append(Refusal("boundary", one.where, differing(text, full_text), setting))
                elif not several:
                    parts = [_Part(*self._cut(full_text.removeprefix(text), plain=self.is_plain(one.prompt)))]
                    result.shapes.append(self._shape(contexts[key], reply, parts[0].text))
                    stops = self._stops(one, str(reply), parts[0].text) if one.stops else []
                else:
                    try:
                        parts = self._parts(full_text, own_turns, several)
                    except _Differs as error:
                        result.refusals.append(Refusal("turns", one.where, str(error)))
                    result.shapes.append(None)
                completions.append(_Completion(result, contexts[key], parts, stops))
        self._add_ids(completions)
        return results

    def _turns(self, exchanges: Sequence[Exchange]) -> Iterator[list[tuple[str, str]]]:
        """For each reply of several turns, the conversation's text before and up to each of its assistant turns."""
        before: list[Request] = []
        after: list[Request] = []
        counts: list[int] = []
        for one in exchanges:
            for reply in one.replies:
                several = _several(reply)
                if not several:
                    continue
                if self._control or one.control:
                    raise ValueError(
                        f"{one.where}: expected completions of one turn with a control token, which ends the prompt of "
                        "a reply and is in no later prompt; found one of several turns"
                    )
                request = request_of(one.prompt, one.where)
                assistant_places = [n for n, turn in enumerate(several) if turn.role == "assistant"]
                before += [request.then(several[:n]) for n in assistant_places]
                after += [request.then(several[: n + 1]) for n in assistant_places]
                counts.append(len(assistant_places))
        pairs = zip(self.renderer.prompts(before), self.renderer.wholes(after), strict=True)
        return iter([list(islice(pairs, count)) for count in counts])

    def _parts(self, full_text: str, turns: Sequence[tuple[str, str]], reply: tuple[Message, ...]) -> list[_Part]:
        """Divide the text of a conversation after its prompt into assistant turns and what is between them.

        Args:
            full_text: the text of the conversation.
            turns: for each assistant turn the text of the conversation before it, and up to it.
            reply: the turns.

        Raises:
            _Differs: the whole text does not continue a turn as the model has written it.
        """
        parts: list[_Part] = []
        stop = len(turns[0][0])
        assistant_turns = [turn for turn in reply if turn.role == "assistant"]
        for turn, (before, after) in zip(assistant_turns, turns, strict=True):
            text, end = self.frame.cut(after.removeprefix(before))
            for expected, actual in ((before, after), (before, full_text), (before + text + end, full_text)):
                if not actual.startswith(expected):
                    raise _Differs(differing(expected, actual))
            if len(before) > stop:
                parts.append(_Part(full_text[stop : len(before)], "", scored=False))
            parts.append(_Part(text, end, scored=bool(turn.weight)))
            stop = len(before + text + end)
        return parts

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
            request = request_of(one.prompt, one.where).with_values(values)
            prompt = self.renderer.prompts([request])[0]
            return self.renderer.wholes([request.then(reply)])[0].startswith(prompt)

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
        writes_bos = self.has_template or (self.rendered and self._bos_text and text.startswith(self._bos_text))
        return [] if writes_bos else self.bos

    def _context(self, text: str, ids: list[int], control: str) -> Context:
        control = self._control + control
        control_ids = self.boundary.encode([control])[0] if control else []
        return self.boundary.context(text + control, ids + control_ids)

    def _markup_of(self, exchange: Exchange, known: dict[Prompt, str]) -> list[str]:
        """Special tokens in the texts of an exchange; ``known``: those of prompts, which occur several times."""
        prompt = exchange.prompt
        if prompt not in known:
            known[prompt] = self._first_token(prompt if isinstance(prompt, str) else request_of(prompt).turns)
        first_tokens = {"prompt": known[prompt], "completion": self._first_token(_dicts(exchange.replies))}
        return [f"{token!r} in the {name}" for name, token in first_tokens.items() if token]

    def _first_token(self, value: object) -> str:
        return next((token[0] for text in _strings(value) if (token := self._markup.search(text))), "")

    def _shape(self, context: Context, reply: Reply, body: str) -> Shape | None:
        core = reply.strip() if isinstance(reply, str) else ""
        at, text = self._find(str(reply), body)
        if not (context.safe and core and at >= 0):
            return None
        treatment = "" if core == reply else "kept" if text == reply else "trimmed"
        return _digest(context.text, body[:at], body[at + len(text) :]), treatment

    def _find(self, reply: str, body: str) -> tuple[int, str]:
        """Return where a completion's text has the reply, -1 if it has not; and the reply, trimmed if it is there."""
        start = len(self.frame.opening) if body.startswith(self.frame.opening) else 0
        at = body.find(reply, start)
        return (at, reply) if at >= 0 else (body.find(reply.strip(), start), reply.strip())

    def _stops(self, one: Exchange, reply: str, body: str) -> list[int]:
        """Return the places of an exchange as places in the completion's text.

        Raises:
            ValueError: the template does not write the reply as it is.
        """
        at, text = self._find(reply, body)
        if at < 0:
            raise ValueError(
                f"{one.where}: expected a chat template that writes a reply with labels of steps as it is, found "
                f"{body[:80]!r} for {reply[:80]!r}; set another template (model.chat_template), or leave the labels of "
                "steps out (loss.step_labels=false)"
            )
        first = at - reply.find(text)
        return [max(at, first + stop) if stop else 0 for stop in one.stops]

    def _add_ids(self, completions: Sequence[_Completion]) -> None:
        # Part by part, each after the ids of those before it, as a server continues the ids of its prompt.
        number, current = 0, list(completions)
        while current:
            parts = [one.parts[number] for one in current]
            part_ids = self.boundary.after([one.context for one in current], [part.text + part.end for part in parts])
            for one, part, ids in zip(current, parts, part_ids, strict=True):
                last = number + 1 == len(one.parts)
                ids = self._with_end(one.context, part, ids, last=last)
                if one.stops:
                    ends = self.boundary.ends(one.context, (part.text + part.end, part.text), ids)
                    one.owner.stops = [sum(end <= stop for end in ends) if stop else 0 for stop in one.stops]
                one.add(part, ids)
                if not last:
                    text = one.context.text + part.text + part.end
                    one.context = self.boundary.context(text, [*one.context.ids, *ids])
            number, current = number + 1, [one for one in current if number + 1 < len(one.parts)]
        for one in completions:
            one.owner.completions.append(one.ids)
            one.owner.context.append(one.unscored)

    def _with_end(self, context: Context, part: _Part, ids: list[int], *, last: bool) -> list[int]:
        if not part.end:
            return [*ids, self.frame.end] if last else ids
        end = cast(int, self.renderer.tokenizer.convert_tokens_to_ids(part.end))
        if ids[-1:] != [end]:  # a tokenizer may split special tokens like any text
            return [*self.boundary.after([context], [part.text])[0], end]
        return ids


class _Differs(Exception):
    """A conversation does not continue a turn as the model has written it; the message says where."""


def _several(reply: Reply) -> tuple[Message, ...]:
    """The turns of a reply of several, else none."""
    return () if isinstance(reply, str) or len(reply) == 1 else reply


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
