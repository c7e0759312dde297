"""Random records under tokenizers of five families: which tokens are scored, and what truncation leaves."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halos.data.records.record import Completion, Message, Prompt, Record
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.tokenise import make_rows
from halos.data.views.derive import VIEWS
from halos.data.views.examples import Example
from tests.tiny import BOS, CHATML, EOS, PAD, SPECIAL, UNK, WITH_BOS, WITH_EOT, bpe_tokenizer, wrap

ALPHABET = "abcdefgh .,:\n<|>é漢🙂"


def unigram(template: str | None, **options: Any) -> PreTrainedTokenizerFast:
    """SentencePiece's kind: pieces with ▁ for spaces, one for each character of the alphabet among them."""
    characters = sorted({*ALPHABET, "▁"} - {" "})
    pieces = [(token, 0.0) for token in SPECIAL] + [(c, -5.0 - n / 10) for n, c in enumerate(characters)]
    pieces += [("▁a", -2.0), ("ab", -2.5), ("abc", -3.0), ("▁▁", -3.5), ("user", -2.0), (":▁", -2.0)]
    pieces += [(c, -9.0) for c in map(chr, range(33, 127)) if c not in characters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=SPECIAL.index(UNK), byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(list(SPECIAL))
    return wrap(tokenizer, template, **options)


def characters(template: str | None, **options: Any) -> PreTrainedTokenizerFast:
    """One id for each word or separator; words are single letters, so that every text can be written."""
    letters = dict.fromkeys((*SPECIAL, *ALPHABET, *map(chr, range(32, 127))))
    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(letters)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    return wrap(tokenizer, template, **options)


def byte_unigram(template: str | None, **options: Any) -> PreTrainedTokenizerFast:
    """A unigram model over bytes, trained."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, unk_token=UNK, show_progress=False
    )
    tokenizer.train_from_iterator(["abc abd, abe: agh 漢 é"] * 20, trainer)
    return wrap(tokenizer, template, **options)


TOKENIZERS = {
    "byte-level BPE, ChatML": bpe_tokenizer(CHATML),
    "byte-level BPE, BOS, pad is EOS": bpe_tokenizer(WITH_BOS, bos=True, pad=EOS),
    "unigram, BOS, pad of its own": unigram(WITH_EOT, bos=True, pad=PAD),
    "word-level, no template, BOS, pad is EOS": characters(None, bos=True, pad=EOS),
    "unigram over bytes, no template, no BOS, pad of its own": byte_unigram(None, pad=PAD),
}

texts = st.text(ALPHABET, max_size=24)
said = texts.filter(str.strip)


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    if draw(st.booleans()):
        return draw(said)
    turns = [Message("system", draw(said))] * draw(st.booleans())
    for _ in range(draw(st.integers(0, 2))):
        turns += [Message("user", draw(said)), Message("assistant", draw(said))]
    return (*turns, Message(draw(st.sampled_from(["user", "tool"])), draw(said)))


@st.composite
def records(draw: st.DrawFn) -> Record:
    completions = tuple(Completion(draw(said), draw(st.booleans()), draw(st.floats(-9, 9))) for _ in range(3))
    return Record("r:1", draw(prompts()), completions, ((0, 1), (2, 1)))


def completions_of(example: Example) -> tuple[str, ...]:
    both = (getattr(example, name, None) for name in ("chosen", "rejected", "completion"))
    return tuple(text for text in both if text is not None)


def decode(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", TOKENIZERS)
@few
@given(record=records(), view=st.sampled_from(sorted(VIEWS)))
def test_scored_tokens_are_the_completion_and_its_end_and_no_prompt(name: str, record: Record, view: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = ChatTokens(tokenizer, Limits(4096))
    try:
        examples = VIEWS[view]([record]).examples
    except ValueError:
        return  # this record has nothing for this view
    rows = make_rows(examples, tokens).table
    end = tokenizer.convert_ids_to_tokens(tokens.end_of_turn)
    for example, row in zip(examples, rows, strict=True):
        alone = tokens.prompt(example.prompt)
        assert list(row.prompt) == alone, "the boundary does not depend on the completion"
        assert decode(tokenizer, row.prompt).count(BOS) <= 1
        for text, branch in zip(completions_of(example), row.branches, strict=True):
            assert decode(tokenizer, branch) == text + end  # type: ignore[operator]
            assert branch[-1] == tokens.end_of_turn
            assert decode(tokenizer, [*row.prompt, *branch]) == decode(tokenizer, row.prompt) + text + end  # type: ignore[operator]


@pytest.mark.parametrize("name", TOKENIZERS)
@few
@given(record=records(), longest=st.integers(2, 60), data=st.data())
def test_truncation_is_counted_and_never_empties(name: str, record: Record, longest: int, data: st.DataObject) -> None:
    tokens = ChatTokens(TOKENIZERS[name], Limits(longest, data.draw(st.integers(1, longest - 1))))
    examples = VIEWS["pairs"]([record]).examples
    made = make_rows(examples, tokens, origin=lambda _: "f")
    cut = {"prompts truncated": 0, "completions truncated": 0}
    for example, row in zip(examples, made.table, strict=True):
        whole = tokens.prompt(example.prompt)
        assert 0 < len(row.prompt) <= (tokens.limits.max_prompt_length or 0)
        assert row.prompt[-1] == whole[-1], "a prompt keeps its end"
        cut["prompts truncated"] += len(row.prompt) < len(whole)
        for text, branch in zip(completions_of(example), row.branches, strict=True):
            full = tokens.completion(text, example.prompt)
            assert 0 < len(branch) <= longest - len(row.prompt)
            assert list(branch) == full[: len(branch)]
            cut["completions truncated"] += len(branch) < len(full)
    assert made.report == {reason: count for reason, count in cut.items() if count}
    assert made.truncated == {(reason, "f"): count for reason, count in cut.items() if count}
