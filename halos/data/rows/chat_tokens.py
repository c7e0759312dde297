"""Records' text → token ids, with the boundary between prompt and completion fixed once.

The prompt is rendered by the model's own chat template, with its generation prompt. The completion is tokenised by
itself and followed by the end-of-turn token, so no merge can move the boundary. A truncated completion gets no
end-of-turn token: the model is never taught to stop where a limit cut the text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halos.data.records.record import Prompt, messages_of
from halos.data.rows.templates import PLAIN_TEMPLATE

log = logging.getLogger(__name__)

_SENTINEL = "halos-sentinel"


@dataclass(frozen=True, slots=True)
class Limits:
    """Token limits: ``max_length`` for prompt plus completion, ``max_prompt_length`` for the prompt alone.

    With ``max_prompt_length`` a longer prompt keeps its end (and its BOS token). Without it every prompt has to fit.
    """

    max_length: int
    max_prompt_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_length", "max_prompt_length"):
            value = getattr(self, name)
            if type(value) is not int and (name == "max_length" or value is not None):
                raise ValueError(f"data.{name}: expected a whole number, found {value!r}")
        if self.max_length < 2:
            raise ValueError(
                f"data.max_length: expected at least 2 (a prompt and a completion token), found {self.max_length}"
            )
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise ValueError(
                f"data.max_prompt_length: expected between 1 and data.max_length - 1 = {self.max_length - 1} "
                f"(something must be left for the completion), found {self.max_prompt_length}"
            )

    def fit_prompt(self, ids: list[int], bos: int | None, where: str) -> tuple[list[int], bool]:
        """(ids within the limits, whether they were cut).

        Raises ``ValueError`` if the prompt has no tokens, or if it leaves no room for a completion and no
        ``max_prompt_length`` is set.
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
        if limit > 1 and bos is not None and ids[0] == bos:
            return [bos, *ids[len(ids) - limit + 1 :]], True
        return ids[len(ids) - limit :], True

    def fit_completion(self, ids: list[int], prompt_length: int) -> tuple[list[int], bool]:
        """(the start of the completion that fits behind the prompt, whether it was cut)."""
        room = self.max_length - prompt_length
        return ids[:room], len(ids) > room


class ChatTokens:
    """Token ids of prompts and completions under one tokenizer.

    ``control`` is text that ends every prompt (a control token of CSFT); it is added here, once, to the ids: the
    records stay as they are.

    Raises ``ValueError`` if the tokenizer has no token that can end a turn.
    """

    def __init__(self, tokenizer: Any, limits: Limits) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.end_of_turn: int = end_of_turn_id(tokenizer)
        self._said_plain = False
        self._bos = _automatic_bos(tokenizer)

    def prompt(self, prompt: Prompt, control: str = "", *, where: str = "prompt") -> list[int]:
        """All ids of the prompt, before truncation."""
        if isinstance(prompt, str) and self.tokenizer.chat_template is None:
            ids = self._bos + self._plain(prompt)
        elif self.tokenizer.chat_template is None:
            self._say_plain()
            ids = self._bos + self._plain(self._render(prompt, PLAIN_TEMPLATE, where))
        else:
            # The template writes its own BOS, so the tokenizer must not add a second one.
            ids = self._plain(self._render(prompt, None, where))
        return ids + self.control(control)

    def control(self, text: str) -> list[int]:
        """Ids of text that ends prompts."""
        return self._plain(text) if text else []

    def _say_plain(self) -> None:
        if not self._said_plain:
            log.warning(
                "the tokenizer has no chat template: conversations are written as 'User:\\n…\\n\\nAssistant:\\n…'; "
                "model.chat_template gives another"
            )
        self._said_plain = True

    def fit_prompt(self, ids: list[int], where: str) -> tuple[list[int], bool]:
        """See :meth:`Limits.fit_prompt`."""
        return self.limits.fit_prompt(ids, self.tokenizer.bos_token_id, where)

    def completion(self, text: str) -> list[int]:
        """Ids of the completion followed by the end-of-turn token, before truncation."""
        return [*self._plain(text), self.end_of_turn]

    def fit_completion(self, ids: list[int], prompt_length: int) -> tuple[list[int], bool]:
        """See :meth:`Limits.fit_completion`."""
        return self.limits.fit_completion(ids, prompt_length)

    def many_prompts(self, prompts: Sequence[Prompt], where: Sequence[str]) -> list[list[int]]:
        """:meth:`prompt` of many at once; a prompt that comes twice is tokenised once."""
        places = dict(zip(reversed(prompts), reversed(where), strict=True))
        conversations = [prompt for prompt in places if not self._is_text(prompt)]
        rendered: dict[Prompt, str] = dict(zip(conversations, self._render_many(conversations, places), strict=True))
        bos = [] if self.tokenizer.chat_template is not None else self._bos
        ids = self._many([rendered[prompt] if prompt in rendered else str(prompt) for prompt in places])
        found = dict(zip(places, ids, strict=True))
        return [[*bos, *found[prompt]] for prompt in prompts]

    def many_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`completion` of many at once."""
        return [[*ids, self.end_of_turn] for ids in self._many(texts)]

    @property
    def key(self) -> str:
        """A key of all that decides which ids a text becomes."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # Without a backend, whose file tells everything, settings such as do_lower_case lie in what it was made with.
        given = (tokenizer.get_vocab(), tokenizer.init_kwargs)
        words = json.dumps(given, sort_keys=True, default=str) if backend is None else backend.to_str()
        # A template writes special tokens by their names; whether they split in text is no part of the backend's file.
        special = (sorted(tokenizer.special_tokens_map.items()), tokenizer.split_special_tokens)
        told = (type(tokenizer).__name__, words, tokenizer.chat_template, self._bos, self.end_of_turn, special)
        return hashlib.sha256(repr(told).encode()).hexdigest()[:24]

    def _is_text(self, prompt: Prompt) -> bool:
        return isinstance(prompt, str) and self.tokenizer.chat_template is None

    def _many(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        # The tokenizer's own call does the same, at half the speed: it makes masks and offsets as well.
        if (
            hasattr(backend, "encode_batch_fast")
            and backend.padding is backend.truncation is None
            and backend.encode_special_tokens == self.tokenizer.split_special_tokens
        ):
            return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def _render_many(self, prompts: Sequence[Prompt], places: Mapping[Prompt, str]) -> list[str]:
        if not prompts:
            return []
        template = None
        if self.tokenizer.chat_template is None:
            self._say_plain()
            template = PLAIN_TEMPLATE
        try:
            conversations = [_turns(prompt) for prompt in prompts]
            return list(
                self.tokenizer.apply_chat_template(
                    conversations, chat_template=template, add_generation_prompt=True, tokenize=False
                )
            )
        except Exception:  # whose it is, says the one that is rendered by itself
            return [self._render(prompt, template, places[prompt]) for prompt in prompts]

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, prompt: Prompt, template: str | None, where: str) -> str:
        turns = _turns(prompt)
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates raise whatever they like (jinja's TemplateError among others)
            roles = ", ".join(turn["role"] for turn in turns)
            raise ValueError(f"{where}: the chat template refused a prompt with the turns {roles}: {error}") from error


def _turns(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages_of(prompt)]


def end_of_turn_id(tokenizer: Any) -> int:
    """The token with which the chat template closes an assistant turn, else the tokenizer's EOS."""
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _SENTINEL}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_SENTINEL)[2]
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        # Not every special token has a name in the tokenizer's config: all_special_ids alone misses Phi-3's <|end|>.
        marked = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        if ids and ids[0] in marked.union(tokenizer.all_special_ids):
            return int(ids[0])
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no token that ends a turn: expected an eos_token, or a chat template that closes the "
            "assistant's turn with a special token"
        )
    return int(tokenizer.eos_token_id)


def _automatic_bos(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before plain text: [BOS] or nothing (never an EOS behind it)."""
    ids = tokenizer("")["input_ids"]
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []
