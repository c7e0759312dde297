"""Token ids of a text that continues another one, with the boundary between them fixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halos.data.rows.rendering import pattern_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("\n", "a", ".", "0", " ")
"""Texts before a continuation, where a special token cannot stand there; see :meth:`Boundary._continuation`."""


@dataclass(frozen=True, slots=True)
class Context:
    """The end of a text, from which the tokens of its continuation follow.

    Attributes:
        text: the text from its last safe split on.
        ids: its token ids, which are the last ones of the whole text.
        safe: whether the text begins at a safe split, so that nothing before it matters. If not, it is whole.
    """

    text: str
    ids: list[int]
    safe: bool


class Boundary:
    """Tokenises texts, and texts that continue others.

    A special token is a safe split: a tokenizer cuts the text at these tokens first, and tokenises the pieces between
    them separately. What comes before the last special token therefore does not change the ids after it.

    Args:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # Slow tokenizers, and those that split special tokens like any text, have no split that is known to be safe.
        fast = self.backend is not None and not tokenizer.split_special_tokens
        added = tokenizer.added_tokens_decoder.values() if fast else ()
        splits = [token for token in added if token.special and not (token.normalized or token.single_word)]
        self._splits = pattern_of(token.content for token in splits)
        self._tails: dict[str, list[int]] = {}
        self._anchors = (*[token.content for token in splits if not token.rstrip][:1], *_ANCHORS)

    @property
    def backend(self) -> Tokenizer | None:
        """The tokenizer's implementation in Rust, if it has one."""
        backend: Tokenizer | None = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, each by itself, without tokens that a tokenizer adds (BOS, EOS)."""
        if not texts:
            return []
        backend = self.backend
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

    def context(self, text: str, ids: list[int]) -> Context:
        """Return the context that a text gives to its continuation.

        Args:
            text: the whole text.
            ids: its token ids.
        """
        # Nearly all prompts of a data set end alike: with the generation prompt.
        tail = next((tail for tail in self._tails if text.endswith(tail)), None)
        if tail is None:
            splits = list(self._splits.finditer(text))
            if not splits:
                return Context(text, ids, safe=False)
            tail = text[splits[-1].start() :]
            if len(self._tails) < 64:
                self._tails[tail] = self.encode([tail])[0]
        tail_ids = self._tails.get(tail) or self.encode([tail])[0]
        safe = ids[-len(tail_ids) :] == tail_ids
        return Context(tail, tail_ids, safe=True) if safe else Context(text, ids, safe=False)

    def after(self, contexts: Sequence[Context], texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, each after its context.

        They are the ids that the tokenizer gives to context and text together, without those of the context. Where a
        token of these crosses the boundary, they are ids that continue those of the context.

        Raises:
            ValueError: the tokenizer gives no ids that continue the context's.
        """
        encoded = self.encode([context.text + text for context, text in zip(contexts, texts, strict=True)])
        return [
            full_ids[len(context.ids) :]
            if self._splits_at(context.ids, full_ids, text)
            else self._continuation(context, text, full_ids)
            for context, text, full_ids in zip(contexts, texts, encoded, strict=True)
        ]

    def ends(self, context: Context, texts: Sequence[str], ids: list[int]) -> list[int]:
        """Return the places in a text where the last characters of its tokens end.

        Args:
            context: the text before it.
            texts: the text, and what else its ids may have been made of, in the order of preference.
            ids: the ids of one of the texts after the context, perhaps with one more id at the end.

        Returns:
            A place for each id of the text.

        Raises:
            ValueError: the tokenizer does not tell where its tokens are, or gives no text these ids.
        """
        if self.backend is None:
            found = f"found {type(self.tokenizer).__name__}, a slow one"
            raise ValueError(
                f"tokenizer: expected a fast one with labels of steps, which tells where tokens are, {found}"
            )
        for before in (context.text, *self._anchors):
            count = len(context.ids) if before == context.text else len(self.encode([before])[0])
            for text in texts:
                encoding = self.backend.encode(before + text, add_special_tokens=False)
                if encoding.ids[count:] in (ids, ids[:-1]):
                    return [max(0, stop - len(before)) for _, stop in encoding.offsets[count:]]
        raise ValueError(
            f"tokenizer: expected {texts[0][:40]!r} to have the same ids again, found others; without "
            "them the tokens of its steps are not known"
        )

    def _splits_at(self, ids: list[int], full_ids: list[int], text: str) -> bool:
        # One unknown token may stand for the end of the context and the beginning of the text together.
        unknown = self.tokenizer.unk_token_id
        known = not ids or unknown is None or ids[-1] != unknown
        return known and full_ids[: len(ids)] == ids and (len(full_ids) > len(ids) or not text)

    def _continuation(self, context: Context, text: str, full_ids: list[int]) -> list[int]:
        """Ids of the text after another one that it does not merge with, if they continue the context."""
        # Alone, the text would get the space that some tokenizers put before every text.
        expected, choices = self._decode(full_ids), list[list[int]]()
        for anchor in self._anchors:
            start, both = self.encode([anchor, anchor + text])
            if both[: len(start)] != start:
                continue
            choices.append(both[len(start) :])
            if self._decode([*context.ids, *choices[-1]]) == expected:
                return choices[-1]
        if expected == context.text + text:
            raise ValueError(
                f"tokenizer: expected token ids with which {text[:40]!r} continues {context.text[-40:]!r}, found none "
                "that decode to the same text"
            )
        return choices[0] if choices else self.encode([text])[0]  # this tokenizer loses text anyway

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
