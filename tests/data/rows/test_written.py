"""Tools, calls, thoughts and variables reach the chat template, and one that does not write them is refused."""

from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerBase

from halos.data.records.record import Completion, Conversation, Message, Prompt, Record, Reply, json_text
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.rendering import Renderer, render, request_of
from halos.data.rows.tokenise import make_rows
from halos.data.rows.written import check_written
from halos.data.views.derive import demonstrations, pairs
from tests.tiny import CHATML, bpe_tokenizer

WHOLE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role ~ (' ' ~ m.name if m.name else '') }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if tone %}[{{ tone }}] {% endif %}{% endif %}"
)
"""Writes all that a conversation may have; thoughts of the last turn alone, as Qwen3's template does."""
TOOLS = '[{"name": "f", "a": 1}]'
CALL = Message("assistant", "I ask.", json_text({"tool_calls": [{"function": {"name": "f", "arguments": {"b": "é"}}}]}))
THOUGHT = Message("assistant", "7", json_text({"reasoning_content": "hm"}))
ASKED = (Message("user", "hello"), replace(CALL, content=""), Message("tool", "7", '{"name": "f"}'))
WRITTEN_CALL = '<call>{"name": "f", "arguments": {"b": "é"}}</call>'
START = f"<|im_start|>tools\n{TOOLS[1:-1]}\n<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
TURNS = f"<|im_start|>assistant\n{WRITTEN_CALL}<|im_end|>\n<|im_start|>tool f\n7<|im_end|>\n"
GENERATE = "<|im_start|>assistant\n"


def test_everything_reaches_the_template() -> None:
    tokenizer = bpe_tokenizer(WHOLE)
    prompt = Conversation(ASKED, TOOLS)
    assert render(tokenizer, prompt) == START + TURNS + GENERATE
    assert render(tokenizer, prompt, (THOUGHT,)) == f"{START}{TURNS}{GENERATE}<think>hm</think>7<|im_end|>\n"
    toned = Conversation(ASKED[:1], template_kwargs='{"tone": "kind"}')
    hello = START[START.index("<|im_start|>user") :] + GENERATE
    expected = [START + TURNS + GENERATE, hello, f"{hello}[kind] "]
    assert Renderer(tokenizer).prompts([request_of(prompt), request_of("hello"), request_of(toned)]) == expected


def test_rows_have_the_ids_of_the_written_calls_and_thoughts() -> None:
    tokenizer = bpe_tokenizer(WHOLE)
    prompt = Conversation(ASKED, TOOLS)
    record = Record("r", prompt, (Completion.of((CALL,)), Completion.of((THOUGHT,)), Completion("7")), ((0, 1), (2, 1)))
    tokens = ChatTokens(tokenizer, Limits(4096))
    first, second = make_rows(pairs([record]).examples, tokens).table
    texts = [f"I ask.{WRITTEN_CALL}", "<think>hm</think>7", "7"]
    ids = [(*tokenizer(text, add_special_tokens=False)["input_ids"], tokens.end_of_turn) for text in texts]
    assert (first.branches, second.branches) == ((ids[0], ids[1]), (ids[2], ids[1]))
    assert tokenizer.decode(list(first.prompt)) == START + TURNS + GENERATE
    assert first.group == second.group
    assert tokens.completion((CALL,), prompt) == list(ids[0])


@pytest.mark.parametrize(
    ("prompt", "reply", "unwritten"),
    [
        (Conversation(ASKED[:1], TOOLS), "7", "tools"),
        (ASKED, "7", "tool_calls"),
        ("hello", (CALL,), "tool_calls"),
        ("hello", (THOUGHT,), "reasoning_content"),
        ("hello", (CALL, Message("tool", "7"), THOUGHT), "tool_calls"),
    ],
)
@pytest.mark.parametrize("template", [CHATML, None])
def test_a_template_that_leaves_them_out_is_refused(
    prompt: Prompt, reply: Reply, unwritten: str, template: str | None
) -> None:
    check_written(bpe_tokenizer(WHOLE), "f:2#0", prompt, (reply,))
    tokenizer = bpe_tokenizer(template)
    expected = f"^f:2#0: expected a chat template that writes {unwritten}, found one whose text is the same without"
    with pytest.raises(ValueError, match=expected):
        check_written(tokenizer, "f:2#0", prompt, (reply,))
    if unwritten == "tools" or reply == "7":  # what is sampled from
        with pytest.raises(ValueError, match=expected):
            tokens_of(tokenizer).fitted_prompt(prompt, where="f:2#0")
    with pytest.raises(ValueError, match=expected.replace("f:2#0", "r#0")):
        make_rows(demonstrations([Record("r", prompt, (Completion.of(reply),))]).examples, tokens_of(tokenizer))


def tokens_of(tokenizer: PreTrainedTokenizerBase) -> ChatTokens:
    return ChatTokens(tokenizer, Limits(4096))


def test_the_check_asks_for_no_more_than_templates_write() -> None:
    thought = replace(THOUGHT, content="good")
    turns = (ASKED[0], thought, ASKED[0])  # left out on purpose, when serving too
    check_written(bpe_tokenizer(WHOLE), "f:2#0", turns, ("7",))
    strict = (
        "{% if messages[-1].role == 'tool' and not messages[-2].tool_calls %}{{ raise_exception('who?') }}{% endif %}x"
    )
    check_written(bpe_tokenizer(strict), "f:2#0", ASKED, ("7",))
