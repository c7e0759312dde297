"""Chat templates with a trait each, the completions that they make, and tokenizers of several families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHATML, SPECIAL, UNK, WITH_BOS, bpe_tokenizer, wrap

ALPHABET = "abcdefgh .,:\n-<>/"
"""Characters that every tokenizer here can write."""
_START = "<|im_start|>{{ m['role'] }}\n"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

THINKS = (
    "{% for m in messages %}" + _START + "{% if m['role'] == 'assistant' and loop.last %}<think>\n"
    "{{ m['reasoning_content'] }}\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}" + _PROMPT + ""
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}"
)
"""Writes a think block into the last turn only, and drops earlier thoughts; without thinking, into the prompt."""

OPENS = THINKS.replace(_PROMPT, _PROMPT.replace("assistant\n", "assistant\n<think>\n"))
"""Its generation prompt opens the think block."""

FORGETS = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}",
)
"""Its generation prompt opens a think block that replies do not have."""

CHANNEL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|good|>final\n{% else %}\n"
    "{% endif %}{{ m['content'] }}{{ '<|eot|>' if loop.last and m['role'] == 'assistant' else '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
"""Writes a channel header before a reply, and another end than that of earlier turns."""

HEADERLESS = CHATML.partition("{% if add_generation_prompt")[0]
"""Writes no generation prompt."""

TRIMS = CHATML.replace("message['content']", "message['content'] | trim")

CALLS = (
    "{% for m in messages %}" + _START + "{{ m['content'] }}{% if m['tool_calls'] %}{% for c in m['tool_calls'] %}"
    "<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}<|eot|>{% else %}<|im_end|>\n{% endif %}"
    "{% endfor %}" + _PROMPT
)
"""Writes tool calls, and ends them with a token of their own."""

DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n" + CHATML

SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
"""Writes BOS and a space before each reply, and its generation prompt is not a special token (Llama 2)."""

LINES = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Its markers are plain text, as Zephyr's are."""

TEXT_ENDS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Closes turns with plain text."""


def _same(reply: str) -> str:
    return reply


@dataclass(frozen=True)
class Trait:
    """A template, and the completion that it makes of a reply: what it writes after its own prompt."""

    template: str
    opening: str = ""
    closing: str = "<|im_end|>"
    content: Callable[[str], str] = _same
    values: dict[str, Any] = field(default_factory=dict)

    def completion(self, reply: str) -> str:
        return self.opening + self.content(reply) + self.closing


TRAITS = {
    "none": Trait(CHATML),
    "think block inserted": Trait(THINKS, "<think>\n\n</think>\n\n"),
    "think block in the prompt": Trait(THINKS, "<think>\n\n</think>\n\n", values={"enable_thinking": True}),
    "think tag opened": Trait(OPENS, "\n</think>\n\n"),
    "channel header": Trait(CHANNEL, "<|good|>final\n", "<|eot|>"),
    "no generation prompt": Trait(HEADERLESS, "<|im_start|>assistant\n"),
    "trims": Trait(TRIMS, content=str.strip),
    "dated": Trait(DATED),
    "writes BOS": Trait(WITH_BOS, closing="</s>"),
    "spaces": Trait(SPACED, " ", " </s>"),
    "plain markers": Trait(LINES, closing="</s>"),
}


def metaspace_bpe(template: Any = None, *, scheme: Any = "first", **options: Any) -> PreTrainedTokenizerFast:
    """BPE with ▁ for spaces, and a dummy one before a text that stands alone."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = [*ALPHABET.replace(" ", "▁"), *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=220, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["abc bad ab: a\nab </think>\n\n abc assistant user"] * 5, trainer)
    return wrap(tokenizer, template, **options)


def legacy_bpe(template: Any = None, **options: Any) -> PreTrainedTokenizerFast:
    """As SentencePiece tokenizers were first converted: a normaliser puts the dummy space, after special tokens too."""
    made = metaspace_bpe(template, scheme="never", **options)
    made.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.backend_tokenizer.pre_tokenizer = None
    made.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def unigram(template: Any = None, *, scheme: Any = "first", **options: Any) -> PreTrainedTokenizerFast:
    """A unigram model whose pieces cross words, with a dummy space before a text that stands alone."""
    characters = sorted({*ALPHABET, *map(chr, range(33, 127)), "▁"} - {" "})
    pieces = [(token, 0.0) for token in SPECIAL] + [(c, -5.0 - n / 50) for n, c in enumerate(characters)]
    pieces += [("▁a", -2.0), ("ab", -2.5), ("abc", -3.0), ("▁▁", -3.5), ("user", -2.0), (":▁", -2.0), ("\na", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=SPECIAL.index(UNK), byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(list(SPECIAL))
    return wrap(tokenizer, template, **options)


def word_piece(template: Any = None, **options: Any) -> PreTrainedTokenizerFast:
    """Pieces of words, of which ## marks all but the first; it loses white space."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), "abc", "##bc", "##ab", "user", "assistant"]
    vocabulary = {token: n for n, token in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK, max_input_chars_per_word=100))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(list(SPECIAL))
    return wrap(tokenizer, template, **options)


FAMILIES: dict[str, Callable[..., PreTrainedTokenizerFast]] = {
    "byte-level BPE": bpe_tokenizer,
    "Metaspace BPE": metaspace_bpe,
    "Metaspace BPE, a space after every special token": partial(metaspace_bpe, scheme="always"),
    "legacy SentencePiece BPE": legacy_bpe,
    "unigram": unigram,
    "word pieces": word_piece,
}
EXACT = ("byte-level BPE", "Metaspace BPE", "unigram")
"""Families whose ids decode to the text that they came from."""
