"""Token ids of prompts and completions, equal to those that a server would use.

A truncated completion gets no token that ends a turn: the model is never taught to stop where a limit cut the text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from halos.checks import check_whole
from halos.data.records.record import Prompt, Reply
from halos.data.rows.boundary import Boundary
from halos.data.rows.exchanges import Exchange, Exchanges, Tokenised
from halos.data.rows.refusals import Refusal, Refusals, check_refusals
from halos.data.rows.rendering import Renderer, frame_of, pattern_of, special_tokens
from halos.data.rows.written import check_written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

TEXTS = ("plain", "rendered")
"""Values of ``data.text``."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Token limits of a row.

    Attributes:
        max_length: the maximum length of prompt plus completion.
        max_prompt_length: the maximum length of a prompt; a longer one keeps its end (and its BOS token). None: every
            prompt has to fit into ``max_length``.

    Raises:
        ValueError: a limit is not a whole number in its range.
    """

    max_length: int
    max_prompt_length: int | None = None

    def __post_init__(self) -> None:
        check_whole("data.max_length", self.max_length, 2)  # a prompt token and a completion token
        check_whole("data.max_prompt_length", self.max_prompt_length, 1, null=True)
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"data.max_prompt_length: expected between 1 and data.max_length - 1 = {self.max_length - 1} "
                f"(something must be left for the completion), found {self.max_prompt_length}"
            )

    def fit_prompt(self, ids: list[int], bos: int | None, where: str) -> tuple[list[int], bool]:
        """Truncate a prompt to the limits.

        Args:
            ids: token ids of the whole prompt.
            bos: the BOS token, which a truncated prompt keeps.
            where: the place of the prompt in the data, for errors.

        Returns:
            The ids within the limits, and whether the prompt was truncated.

        Raises:
            ValueError: the prompt has no tokens, or leaves no room for a completion and ``max_prompt_length`` is None.
        """
        if not ids:
            raise ValueError(f"{where}: expected a prompt with at least one token, found none under this tokenizer")
        limit = self.max_prompt_length
        if limit is None:
            if len(ids) >= self.max_length:
                raise ValueError(
                    f"{where}: expected a prompt shorter than data.max_length = {self.max_length} tokens, found "
                    f"{len(ids)}; raise data.max_length, or set data.max_prompt_length to keep the end of long prompts"
                )
            return ids, False
        if len(ids) <= limit:
            return ids, False
        # Models are trained with BOS at position 0, so it stays when the beginning is cut off.
        if limit > 1 and bos is not None and ids[0] == bos:
            return [bos, *ids[len(ids) - limit + 1 :]], True
        return ids[len(ids) - limit :], True

    def fit_completion(self, ids: list[int], prompt_length: int) -> tuple[list[int], bool]:
        """Truncate a completion to the room after its prompt.

        Returns:
            The first ids that fit, and whether the completion was truncated.
        """
        room = self.max_length - prompt_length
        return ids[:room], len(ids) > room


class ChatTokens:
    """Converts prompts and completions to token ids with one tokenizer.

    Args:
        tokenizer: the model's tokenizer.
        limits: token limits of a row.
        text: ``plain``: texts are rendered by the chat template. ``rendered``: they carry its markup already.

    Attributes:
        end_of_turn: the token that ends a completion.

    Raises:
        ValueError: the tokenizer has no token that can end a turn, or several chat templates without a default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: Limits, text: str = "plain") -> None:
        check_text(text)
        self.tokenizer = tokenizer
        self.limits = limits
        self._text = text
        self._renderer = Renderer(tokenizer)
        self._frame = frame_of(self._renderer)
        self.end_of_turn: int = self._frame.end
        self._special = pattern_of(special_tokens(tokenizer))
        self._warned_of_plain = False
        self._boundary, bos = Boundary(tokenizer), _automatic_bos(tokenizer)
        self._exchanges = Exchanges(self._renderer, self._boundary, self._frame, bos, rendered=text == "rendered")

    @property
    def pad(self) -> int:
        """The padding token."""
        return cast(int, self.tokenizer.pad_token_id)

    def prompt(self, prompt: Prompt, control: str = "", *, where: str = "prompt") -> list[int]:
        """Token ids of a prompt, before truncation: those that a server gets for it.

        Args:
            prompt: text or turns.
            control: text that ends the prompt (a control token of CSFT). It is added here, once; records never hold it.
            where: the place of the prompt in the data, for errors.

        Raises:
            ValueError: the chat template refuses the turns.
        """
        check_written(self.tokenizer, where, prompt)
        return self.tokenise([Exchange(where, prompt)])[0].prompt + self.control(control)

    def fitted_prompt(self, prompt: Prompt, control: str = "", *, where: str = "prompt") -> list[int]:
        """Token ids of a prompt, truncated to the limits; see :meth:`prompt` and :meth:`Limits.fit_prompt`."""
        return self.fit_prompt(self.prompt(prompt, control, where=where), where)[0]

    def control(self, text: str) -> list[int]:
        """Token ids of text that ends prompts."""
        return self._boundary.encode([text])[0] if text else []

    def fit_prompt(self, ids: list[int], where: str) -> tuple[list[int], bool]:
        """See :meth:`Limits.fit_prompt`."""
        return self.limits.fit_prompt(ids, self.tokenizer.bos_token_id, where)

    def completion(self, reply: Reply, prompt: Prompt, control: str = "", *, where: str = "prompt") -> list[int]:
        """Token ids of a completion after its prompt, with the token that ends it, before truncation.

        Args:
            reply: the assistant's text, or one or more turns.
            prompt: text or turns.
            control: text between prompt and completion.
            where: the place of the prompt in the data, for errors.

        Raises:
            ValueError: the chat template refuses the turns, or does not continue its own prompt with the reply.
        """
        (tokenised,) = self.tokenise([Exchange(where, prompt, (reply,), control)])
        self.check([one for one in tokenised.refusals if one.kind != "markup"], 1)
        return tokenised.completions[0]

    def tokenise(self, exchanges: Sequence[Exchange]) -> list[Tokenised]:
        """Token ids of prompts and their completions; see :meth:`Exchanges.tokenise`."""
        if not self._warned_of_plain and self.tokenizer.chat_template is None:
            self._warn_of_plain(exchanges)
        return self._exchanges.tokenise(exchanges)

    def check(self, refusals: Sequence[Refusal], examples: int) -> None:
        """Raise ``ValueError`` if examples were refused; ``examples`` is the number of all examples, for the error."""
        counted = Refusals()
        counted.add(refusals)
        self.check_notes([counted.notes()], examples)

    def check_notes(self, parts: Sequence[Mapping[str, Any]], examples: int) -> None:
        """Raise ``ValueError`` if the notes of a data set's parts have refusals; see :func:`check_refusals`."""
        check_refusals(parts, examples, str(self._renderer.template))

    def fit_completion(self, ids: list[int], prompt_length: int) -> tuple[list[int], bool]:
        """See :meth:`Limits.fit_completion`."""
        return self.limits.fit_completion(ids, prompt_length)

    def text(self, completion: Sequence[int]) -> str:
        """The reply in a completion's token ids, as a server returns it.

        It has neither the token that ends it, nor other special tokens, nor what the chat template writes before a
        plain reply and would write again.
        """
        ended = len(completion) > 0 and completion[-1] == self.end_of_turn
        ids, opening = list(completion[:-1] if ended else completion), self._frame.opening
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        if opening and str(self.tokenizer.decode(ids)).startswith(opening):
            text = text.removeprefix(self._special.sub("", opening))
        return text

    @property
    def key(self) -> str:
        """A key of everything that decides which token ids a text becomes."""
        tokenizer = self.tokenizer
        backend = self._boundary.backend
        # A backend's file holds every setting. Slow tokenizers have no such file: settings such as do_lower_case are
        # only in the arguments of their constructor.
        settings = (tokenizer.get_vocab(), tokenizer.init_kwargs)
        state = json.dumps(settings, sort_keys=True, default=str) if backend is None else backend.to_str()
        # Templates write special tokens by name, and whether these are split in text is not in the backend's file.
        special = (sorted(tokenizer.special_tokens_map.items()), tokenizer.split_special_tokens)
        template = None if tokenizer.chat_template is None else (self._renderer.template, self._renderer.control)
        bos = self._exchanges.bos
        parts = (type(tokenizer).__name__, state, template, bos, self.end_of_turn, special, self._text)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]

    def _warn_of_plain(self, exchanges: Sequence[Exchange]) -> None:
        """Warn once how prompts and completions are written if the tokenizer has no chat template."""
        if not all(self._exchanges.is_plain(one.prompt) for one in exchanges):
            how = "conversations are written as 'User:\\n…\\n\\nAssistant:\\n…'; set another with model.chat_template"
        elif self._text == "plain" and any(map(_is_joined, exchanges)):
            how = (
                "prompts and completions are written one after the other, with nothing between them; set one with "
                "model.chat_template=plain (or chatml), or end the prompts with a line break"
            )
        else:
            return
        self._warned_of_plain = True
        log.warning("the tokenizer has no chat template: %s", how)


def _is_joined(exchange: Exchange) -> bool:
    """Whether a text and its completion meet without white space or a control text between them."""
    prompt = exchange.prompt
    if exchange.control or not isinstance(prompt, str) or prompt[-1:].isspace():
        return False
    return any(isinstance(reply, str) and not reply[:1].isspace() for reply in exchange.replies)


def check_text(text: str) -> None:
    """Raise ``ValueError`` unless it is one of :data:`TEXTS`."""
    if text not in TEXTS:
        raise ValueError(f"data.text: expected {' or '.join(TEXTS)}, found {text!r}")


def _automatic_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that the tokenizer itself puts before plain text, as a list of one or no id (never an EOS after it)."""
    # An empty text shows what the tokenizer adds. The setting itself has many names (add_bos_token, post-processors).
    ids = tokenizer("")["input_ids"]
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []
