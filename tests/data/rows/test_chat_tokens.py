"""Tokens: which ids a prompt and a completion become, where they meet, and what a limit cuts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Wav2Vec2CTCTokenizer

from halos.data.records.record import Message
from halos.data.rows.chat_tokens import ChatTokens, Limits
from tests.tiny import (
    BOS,
    CHATML,
    END,
    EOS,
    EOT,
    GOOD,
    NO_SYSTEM,
    PAD,
    WITH_BOS,
    WITH_EOT,
    bpe_tokenizer,
    word_tokenizer,
)

TURNS = (Message("system", "be good"), Message("user", "hello"))
TEXTS = ["hello world", "", " leading and trailing ", "two\n\nlines", "naïve 漢字 🙂", "</s", "hello<|im_end|>"]


def chat(tokenizer: Any, max_length: int = 512, max_prompt_length: int | None = None) -> ChatTokens:
    return ChatTokens(tokenizer, Limits(max_length, max_prompt_length))


# Prompts


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            CHATML,
            "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
        ),
        (WITH_BOS, "<s>[system] be good[user] hello[assistant] "),
        (WITH_EOT, "<s>system: be good<|eot|>user: hello<|eot|>assistant: "),
        (None, "System:\nbe good\n\nUser:\nhello\n\nAssistant:\n"),
    ],
)
def test_a_conversation_goes_through_the_template_once(template: str | None, expected: str) -> None:
    tokenizer = bpe_tokenizer(template)
    assert tokenizer.decode(chat(tokenizer).prompt(TURNS)) == expected


@pytest.mark.parametrize("template", [CHATML, WITH_BOS, WITH_EOT])
def test_a_text_is_a_user_turn_where_there_is_a_template(template: str) -> None:
    tokens = chat(bpe_tokenizer(template))
    assert tokens.prompt("hello") == tokens.prompt((Message("user", "hello"),))


def test_a_text_stays_plain_where_there_is_no_template() -> None:
    tokenizer = bpe_tokenizer()
    assert tokenizer.decode(chat(tokenizer).prompt("hello world")) == "hello world"


@pytest.mark.parametrize("prompt", ["hello", TURNS])
@pytest.mark.parametrize(
    ("template", "automatic", "count"),
    [
        (None, False, 0),
        (None, True, 1),
        (WITH_BOS, False, 1),
        (WITH_BOS, True, 1),
        (WITH_EOT, True, 1),
        (CHATML, False, 0),
        (CHATML, True, 0),  # the template is the model's own: it says that its conversations start without one
    ],
)
def test_one_bos_never_two(prompt: Any, template: str | None, automatic: bool, count: int) -> None:
    tokenizer = bpe_tokenizer(template, bos=automatic)
    ids = chat(tokenizer).prompt(prompt)
    assert ids.count(tokenizer.bos_token_id) == count
    assert ids[:count] == [tokenizer.bos_token_id] * count


def test_the_template_that_refuses_a_role_is_a_value_error() -> None:
    tokens = chat(bpe_tokenizer(NO_SYSTEM))
    with pytest.raises(ValueError, match=r"refused the turns system, user: System role not supported"):
        tokens.prompt(TURNS)
    assert tokens.prompt("hello")


@pytest.mark.parametrize("template", [None, CHATML, WITH_BOS])
@pytest.mark.parametrize("prompt", ["hello", TURNS])
def test_control_text_ends_the_prompt_once(template: str | None, prompt: Any) -> None:
    tokenizer = bpe_tokenizer(template, bos=True)
    tokens = chat(tokenizer)
    expected = [*tokens.prompt(prompt), tokenizer.convert_tokens_to_ids(GOOD)]
    assert tokens.prompt(prompt, GOOD) == expected
    assert tokens.prompt(prompt, GOOD) == expected, "a second call adds no second one"


# Completions


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, END), (WITH_BOS, EOS), (WITH_EOT, EOT), (None, EOS)],
)
def test_scored_ids_are_the_completion_and_its_end_of_turn(
    template: str | None, end: str, automatic: bool, text: str
) -> None:
    tokenizer = bpe_tokenizer(template, bos=automatic)
    ids = chat(tokenizer).completion(text, "a")
    assert tokenizer.decode(ids) == text + end
    assert ids[-1] == tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("template", [CHATML, WITH_EOT])
def test_prompt_completion_and_end_are_how_the_template_writes_them(template: str) -> None:
    tokenizer = bpe_tokenizer(template)
    tokens = chat(tokenizer)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good world"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    ours = tokenizer.decode(tokens.prompt("hello") + tokens.completion("good world", "a"))
    assert whole.startswith(ours)  # type: ignore[arg-type]
    assert whole[len(ours) :].strip() == ""


def test_ids_by_hand() -> None:
    tokenizer = word_tokenizer(bos=True)
    tokens = chat(tokenizer)
    hello, world = tokenizer.convert_tokens_to_ids(["hello", "world"])  # type: ignore[misc]
    assert tokens.prompt("hello world") == [tokenizer.bos_token_id, hello, world]
    assert tokens.completion("world hello", "a") == [world, hello, tokenizer.eos_token_id]


@pytest.mark.parametrize("pad", [EOS, PAD, None])
def test_the_end_of_turn_survives_a_pad_token_that_equals_eos(pad: str | None) -> None:
    tokenizer = word_tokenizer(pad=pad)
    assert chat(tokenizer).completion("hello", "a")[-1] == tokenizer.eos_token_id


# The end of a turn


@pytest.mark.parametrize("make", [bpe_tokenizer, word_tokenizer])
@pytest.mark.parametrize(("template", "end"), [(CHATML, END), (WITH_EOT, EOT), (WITH_BOS, EOS), (None, EOS)])
def test_the_end_of_turn_is_the_templates_not_eos(make: Callable[..., Any], template: str | None, end: str) -> None:
    tokenizer = make(template)
    assert chat(tokenizer).end_of_turn == tokenizer.convert_tokens_to_ids(end)


def test_a_special_token_that_only_the_vocabulary_knows_can_end_a_turn() -> None:
    # Phi-3 and the first Llama-3 write <|end|> and <|eot_id|>, which their configs do not list.
    tokenizer = bpe_tokenizer(WITH_EOT, named=())
    assert chat(tokenizer).end_of_turn == tokenizer.convert_tokens_to_ids(EOT)


def test_a_template_that_closes_with_plain_text_leaves_eos() -> None:
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    tokenizer = bpe_tokenizer(template)
    assert chat(tokenizer).end_of_turn == tokenizer.eos_token_id


def test_a_template_that_ends_turns_needs_no_eos() -> None:
    tokenizer = bpe_tokenizer(CHATML, eos=None, pad=None)
    assert chat(tokenizer).end_of_turn == tokenizer.convert_tokens_to_ids(END)


@pytest.mark.parametrize("template", [None, "{% for message in messages %}{{ message['content'] }}{% endfor %}"])
def test_no_token_that_ends_a_turn_is_a_value_error(template: str | None) -> None:
    with pytest.raises(ValueError, match="expected a token that ends a turn, found none"):
        chat(bpe_tokenizer(template, eos=None, pad=None))


# Limits


@pytest.mark.parametrize(
    ("longest", "prompt"),
    [
        (1, None),
        (0, None),
        (8, 0),
        (8, 8),
        (8, 9),
        (2, -1),
        (20.5, None),
        (20, 3.0),
        (None, None),
        (True, None),
        (20, True),
    ],
)
def test_impossible_limits_are_refused(longest: Any, prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"^data\.max_"):
        Limits(longest, prompt)


@pytest.mark.parametrize(("longest", "prompt"), [(2, None), (2, 1), (8, 7)])
def test_tight_limits_are_taken(longest: int, prompt: int | None) -> None:
    assert Limits(longest, prompt).max_length == longest


def test_a_long_prompt_without_a_limit_of_its_own_is_an_error_naming_the_example() -> None:
    tokens = chat(word_tokenizer(), max_length=4)
    assert tokens.fit_prompt([9, 9, 9], "f:1#0") == ([9, 9, 9], False)
    with pytest.raises(ValueError, match=r"^f:1#0: .*max_length = 4 tokens, found 4; raise"):
        tokens.fit_prompt([9, 9, 9, 9], "f:1#0")


@pytest.mark.parametrize(
    ("ids", "limit", "kept"),
    [
        ([9, 10, 11], 3, [9, 10, 11]),
        ([9, 10, 11], 2, [10, 11]),
        ([9, 10, 11], 1, [11]),
        ([0, 9, 10, 11], 4, [0, 9, 10, 11]),
        ([0, 9, 10, 11], 3, [0, 10, 11]),  # 0 is BOS
        ([0, 9, 10, 11], 2, [0, 11]),
        ([0, 9, 10, 11], 1, [11]),
        ([9, 0, 10, 11], 2, [10, 11]),
    ],
)
def test_a_cut_prompt_keeps_its_end_and_its_bos(ids: list[int], limit: int, kept: list[int]) -> None:
    tokens = chat(word_tokenizer(), max_length=20, max_prompt_length=limit)
    assert tokens.tokenizer.bos_token_id == 0
    before = list(ids)
    assert tokens.fit_prompt(ids, "f:1#0") == (kept, len(kept) < len(ids))
    assert ids == before


def test_a_cut_prompt_keeps_its_control_token() -> None:
    tokenizer = word_tokenizer(bos=True)
    tokens = chat(tokenizer, max_length=20, max_prompt_length=3)
    ids, cut = tokens.fit_prompt(tokens.prompt("a b c d", GOOD), "f:1#0")
    assert tokenizer.convert_ids_to_tokens(ids) == [BOS, "d", GOOD]
    assert cut


@pytest.mark.parametrize("limit", [None, 4])
def test_a_prompt_without_tokens_is_an_error_naming_the_example(limit: int | None) -> None:
    with pytest.raises(ValueError, match=r"^f:1#0: expected a prompt with at least one token"):
        chat(word_tokenizer(), max_prompt_length=limit).fit_prompt([], "f:1#0")


@pytest.mark.parametrize(("prompt", "kept"), [(7, 1), (5, 3), (3, 5), (2, 5)])
def test_a_cut_completion_keeps_its_start_and_gets_no_end_of_turn(prompt: int, kept: int) -> None:
    tokens = chat(word_tokenizer(CHATML), max_length=8)
    whole = tokens.completion("a b c d", "a")
    ids, cut = tokens.fit_completion(whole, prompt)
    assert ids == whole[:kept]
    assert cut == (kept < 5)
    assert (tokens.end_of_turn in ids) == (not cut)


# The key of kept token ids


def test_the_key_knows_what_the_template_writes_for_a_special_token() -> None:
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    plain, other = chat(bpe_tokenizer(template)), chat(bpe_tokenizer(template))
    assert plain.key == other.key
    other.tokenizer.bos_token = EOT
    assert plain.prompt("hello") != other.prompt("hello")
    assert plain.key != other.key


def test_the_key_knows_whether_special_tokens_in_text_are_split() -> None:
    plain, other = chat(bpe_tokenizer(CHATML)), chat(bpe_tokenizer(CHATML))
    other.tokenizer.split_special_tokens = True
    assert plain.completion("</s>", "a") != other.completion("</s>", "a")
    assert plain.key != other.key


def test_the_key_knows_the_settings_of_a_tokenizer_without_a_backend(tmp_path: Path) -> None:
    file = tmp_path / "vocab.json"
    file.write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5, "A": 6}))
    plain, same, other = (chat(Wav2Vec2CTCTokenizer(file, do_lower_case=lower)) for lower in (False, False, True))
    assert plain.key == same.key
    assert plain.completion("a", "a") != other.completion("a", "a")
    assert plain.key != other.key


def test_a_fitted_prompt_is_truncated_and_a_completions_text_has_no_end_of_turn() -> None:
    tokens = chat(word_tokenizer(), 12, 3)
    whole = tokens.prompt("a b c d", GOOD)
    assert tokens.fitted_prompt("a b c d", GOOD) == tokens.fit_prompt(whole, "prompt")[0] != whole
    ids = tokens.completion("a b", "a")
    assert tokens.text(ids) == tokens.text(ids[:-1]) == tokens.tokenizer.decode(ids[:-1])
    assert tokens.text([]) == ""
