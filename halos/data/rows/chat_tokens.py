"""Token ids of prompts and completions, with the boundary between them fixed once.

The prompt is rendered by the model's own chat template, with its generation prompt. The completion is tokenised
separately and followed by the end-of-turn token, so that no merge of the tokenizer can move the boundary. A truncated
completion gets no end-of-turn token: the model is never taught to stop where a limit cut the text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard, cast

from halos.checks import check_whole
from halos.data.records.record import Message, Prompt, Reply
from halos.data.rows.templates import render, render_prompts, written_reply
from halos.data.rows.written import check_written

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_SENTINEL = "halos-sentinel"


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

    Attributes:
        end_of_turn: the token that ends a completion.

    Raises:
        ValueError: the tokenizer has no token that can end a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.end_of_turn: int = end_of_turn_id(tokenizer)
        self._warned_of_plain = False
        self._bos = _automatic_bos(tokenizer)

    @property
    def pad(self) -> int:
        """The padding token."""
        return cast(int, self.tokenizer.pad_token_id)

    def prompt(self, prompt: Prompt, control: str = "", *, where: str = "prompt") -> list[int]:
        """Token ids of a prompt, before truncation.

        Args:
            prompt: text or turns.
            control: text that ends the prompt (a control token of CSFT). It is added here, once; records never hold it.
            where: the place of the prompt in the data, for errors.

        Raises:
            ValueError: the chat template refuses the turns, or does not write their tools or calls.
        """
        check_written(self.tokenizer, where, prompt, "")
        text = prompt if self._is_plain(prompt) else self._render([prompt], [where])[0]
        return self._added_bos + self._encode(text) + self.control(control)

    def fitted_prompt(self, prompt: Prompt, control: str = "", *, where: str = "prompt") -> list[int]:
        """Token ids of a prompt, truncated to the limits; see :meth:`prompt` and :meth:`Limits.fit_prompt`."""
        return self.fit_prompt(self.prompt(prompt, control, where=where), where)[0]

    def control(self, text: str) -> list[int]:
        """Token ids of text that ends prompts."""
        return self._encode(text) if text else []

    def fit_prompt(self, ids: list[int], where: str) -> tuple[list[int], bool]:
        """See :meth:`Limits.fit_prompt`."""
        return self.limits.fit_prompt(ids, self.tokenizer.bos_token_id, where)

    def completion(self, reply: Reply, prompt: Prompt = "") -> list[int]:
        """Token ids of a completion followed by the end-of-turn token, before truncation.

        A reply with turns is rendered after its prompt.
        """
        text = written_reply(self.tokenizer, prompt, reply)
        # As an id: in text, a tokenizer that splits special tokens would make several tokens of it.
        return [*self._encode(text), self.end_of_turn]

    def fit_completion(self, ids: list[int], prompt_length: int) -> tuple[list[int], bool]:
        """See :meth:`Limits.fit_completion`."""
        return self.limits.fit_completion(ids, prompt_length)

    def text(self, completion: Sequence[int]) -> str:
        """Text of a completion's token ids, without the end-of-turn token at their end."""
        ended = len(completion) > 0 and completion[-1] == self.end_of_turn
        return str(self.tokenizer.decode(list(completion[:-1] if ended else completion)))

    def many_prompts(self, prompts: Sequence[Prompt], where: Sequence[str]) -> list[list[int]]:
        """Token ids of many prompts, as :meth:`prompt` gives them; equal prompts are tokenised once.

        Args:
            prompts: n prompts.
            where: the place of each in the data, for errors.
        """
        # An error names the first place of a repeated prompt, hence the reversed order.
        places = dict(zip(reversed(prompts), reversed(where), strict=True))
        texts: dict[Prompt, str] = {prompt: prompt for prompt in places if self._is_plain(prompt)}
        conversations = [prompt for prompt in places if prompt not in texts]
        rendered = self._render(conversations, [places[prompt] for prompt in conversations])
        texts.update(zip(conversations, rendered, strict=True))
        ids = dict(zip(texts, self._encode_many(list(texts.values())), strict=True))
        return [[*self._added_bos, *ids[prompt]] for prompt in prompts]

    def many_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many completions, as :meth:`completion` gives them."""
        return [[*ids, self.end_of_turn] for ids in self._encode_many(texts)]

    @property
    def key(self) -> str:
        """A key of everything that decides which token ids a text becomes."""
        tokenizer = self.tokenizer
        backend = self._backend
        # A backend's file holds every setting. Slow tokenizers have no such file: settings such as do_lower_case are
        # only in the arguments of their constructor.
        settings = (tokenizer.get_vocab(), tokenizer.init_kwargs)
        state = json.dumps(settings, sort_keys=True, default=str) if backend is None else backend.to_str()
        # Templates write special tokens by name, and whether these are split in text is not in the backend's file.
        special = (sorted(tokenizer.special_tokens_map.items()), tokenizer.split_special_tokens)
        parts = (type(tokenizer).__name__, state, tokenizer.chat_template, self._bos, self.end_of_turn, special)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]

    @property
    def _backend(self) -> Tokenizer | None:
        backend: Tokenizer | None = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend

    @property
    def _added_bos(self) -> list[int]:
        # A template writes its own BOS, so a second one must not be added.
        return self._bos if self.tokenizer.chat_template is None else []

    def _is_plain(self, prompt: Prompt) -> TypeGuard[str]:
        """Whether the prompt is tokenised as it is: a text for a tokenizer that has no chat template."""
        return isinstance(prompt, str) and self.tokenizer.chat_template is None

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        backend = self._backend
        # The tokenizer's own call takes twice as long, because it also makes masks and offsets. The backend gives the
        # same ids unless the tokenizer was set to pad, truncate or split special tokens differently.
        if (
            backend is not None
            and hasattr(backend, "encode_batch_fast")
            and backend.padding is backend.truncation is None
            and backend.encode_special_tokens == self.tokenizer.split_special_tokens
        ):
            return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def _render(self, prompts: Sequence[Prompt], where: Sequence[str]) -> list[str]:
        if prompts and self.tokenizer.chat_template is None and not self._warned_of_plain:
            self._warned_of_plain = True
            log.warning(
                "the tokenizer has no chat template: conversations are written as 'User:\\n…\\n\\nAssistant:\\n…'; "
                "set another with model.chat_template"
            )
        return render_prompts(self.tokenizer, prompts, where)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the chat template closes an assistant turn, else the tokenizer's EOS.

    Raises:
        ValueError: there is neither.
    """
    if tokenizer.chat_template is not None:
        # Whatever the template writes after a reply begins with the token that closes the turn.
        after_reply = render(tokenizer, (Message("user", "a"),), _SENTINEL).rpartition(_SENTINEL)[2]
        ids = tokenizer(after_reply, add_special_tokens=False)["input_ids"]
        # Not every special token has a name in the tokenizer's config: all_special_ids alone misses Phi-3's <|end|>.
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        if ids and ids[0] in special.union(tokenizer.all_special_ids):
            return int(ids[0])
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer: expected a token that ends a turn, found none; set an eos_token, or a chat template that "
            "closes the assistant's turn with a special token"
        )
    return int(tokenizer.eos_token_id)


def _automatic_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that the tokenizer itself puts before plain text, as a list of one or no id (never an EOS after it)."""
    # An empty text shows what the tokenizer adds. The setting itself has many names (add_bos_token, post-processors).
    ids = tokenizer("")["input_ids"]
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []
