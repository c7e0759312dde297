"""Completions of several turns: the assistant's are scored, as served; what others say between them is context."""

from typing import Any

import pytest

from halos.data.records.record import Message, Prompt, json_text
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.exchanges import Exchange, Tokenised
from halos.data.rows.tokenise import few_rows, make_rows
from halos.data.views.examples import Demonstration, Labelled, Pair
from tests.data.rows.traits import CALLS, CHANNEL, EXACT, FAMILIES, TEXT_ENDS, THINKS, TRAITS
from tests.tiny import CHATML, GOOD, bpe_tokenizer

PROMPT = (Message("system", "be"), Message("user", "a"))
REPLY = (
    Message("assistant", "ab"),
    Message("user", "\nc"),
    Message("assistant", "\na"),
    Message("user", "bad"),
    Message("assistant", "abc"),
)
ONCE = ("think block inserted", "think block in the prompt", "think tag opened", "channel header")
"""Traits of templates that write a last turn in another way than an earlier one."""


def tokenise(tokenizer: Any, prompt: Prompt = PROMPT, reply: Any = REPLY, **options: Any) -> Tokenised:
    tokens = ChatTokens(tokenizer, Limits(4096))
    (made,) = tokens.tokenise([Exchange("x", prompt, (reply,), **options)])
    tokens.check(made.refusals, 1)
    return made


def scored_spans(made: Tokenised) -> list[tuple[int, int]]:
    edges = [0, *(edge for span in made.context[0] for edge in span), len(made.completions[0])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def text(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def test_by_hand() -> None:
    tokenizer = bpe_tokenizer(CHATML)
    made = tokenise(tokenizer)
    (ids,) = made.completions
    assert [text(tokenizer, ids[start:stop]) for start, stop in scored_spans(made)] == [
        "ab<|im_end|>",
        "\na<|im_end|>",
        "abc<|im_end|>",
    ]
    assert [text(tokenizer, ids[start:stop]) for start, stop in made.context[0]] == [
        "\n<|im_start|>user\n\nc<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nbad<|im_end|>\n<|im_start|>assistant\n",
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trait", [trait for trait in TRAITS if trait not in ONCE])
def test_each_turn_is_what_it_is_as_the_only_one(trait: str, family: str) -> None:
    tokenizer = FAMILIES[family](TRAITS[trait].template)
    tokens = ChatTokens(tokenizer, Limits(4096))
    made = tokenise(tokenizer)
    ids = made.prompt + made.completions[0]
    turns = [n for n, turn in enumerate(REPLY) if turn.role == "assistant"]
    assert len(scored_spans(made)) == len(turns)
    for n, (start, stop) in zip(turns, scored_spans(made), strict=True):
        before = (*PROMPT, *REPLY[:n])
        served = tokens.prompt(before)
        own = tokens.completion(REPLY[n].content, before)
        if family in EXACT and REPLY[n].content == REPLY[n].content.strip():
            assert ids[len(made.prompt) + start : len(made.prompt) + stop] == own
        if family in EXACT:
            assert text(tokenizer, ids[: len(made.prompt) + start]) == text(tokenizer, served)
        assert text(tokenizer, ids[: len(made.prompt) + stop]) == text(tokenizer, served + own)


def test_the_ids_are_those_of_the_whole_conversation() -> None:
    tokenizer = bpe_tokenizer(CHATML)
    reply = (*REPLY[:2], Message("assistant", "ab"), *REPLY[3:])  # no token crosses a boundary
    turns: Any = [turn.as_dict() for turn in (*PROMPT, *reply)]
    whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    made = tokenise(tokenizer, reply=reply)
    assert made.prompt + made.completions[0] == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_turns_of_weight_0_and_tools_are_context() -> None:
    tokenizer = bpe_tokenizer(CALLS)
    call = Message("assistant", "", json_text({"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}))
    reply = (call, Message("tool", "7"), Message("assistant", "no", weight=0), Message("user", "c"), REPLY[0])
    made = tokenise(tokenizer, reply=reply)
    (ids,) = made.completions
    assert [text(tokenizer, ids[start:stop]) for start, stop in made.context[0]] == [
        "<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n"
    ]
    assert text(tokenizer, ids).startswith('<tool_call>{"name": "f", "arguments": {}}</tool_call><|eot|>')
    assert text(tokenizer, ids).endswith("assistant\nab<|im_end|>")


def test_where_turns_end_with_no_token_the_last_one_gets_eos() -> None:
    tokenizer = bpe_tokenizer(TEXT_ENDS)
    made = tokenise(tokenizer, reply=(REPLY[0], REPLY[3], REPLY[4]))
    (ids,) = made.completions
    assert text(tokenizer, ids) == "ab\nuser: bad\nassistant: abc</s>"
    assert [text(tokenizer, ids[start:stop]) for start, stop in made.context[0]] == ["\nuser: bad\nassistant: "]


@pytest.mark.parametrize("template", [THINKS, CHANNEL])
def test_a_template_that_writes_a_last_turn_in_another_way_is_refused(template: str) -> None:
    with pytest.raises(
        ValueError, match=r"each assistant turn of a completion as it does where it is the last, found 1"
    ):
        tokenise(bpe_tokenizer(template))
    tokenise(bpe_tokenizer(template), reply=REPLY[-1:])


def test_a_control_token_is_in_no_later_prompt() -> None:
    with pytest.raises(ValueError, match=r"^x: expected completions of one turn with a control token"):
        tokenise(bpe_tokenizer(CHATML), control=GOOD)


def test_rows_know_which_tokens_are_scored() -> None:
    tokenizer = bpe_tokenizer(CHATML)
    tokens = ChatTokens(tokenizer, Limits(4096))
    made, short = tokenise(tokenizer), tokens.completion("b", PROMPT)
    row = make_rows([Pair("p", PROMPT, "b", REPLY)], tokens).table[0]
    assert row.branches == (tuple(short), tuple(made.completions[0]))
    assert row.context == ((), tuple(made.context[0]))
    assert list(row.scored(0)) == list(range(len(short)))
    assert list(row.scored(1)) == [n for start, stop in scored_spans(made) for n in range(start, stop)]


@pytest.mark.parametrize("room", [1, 5, 30, 40])
def test_a_completion_is_cut_where_the_limit_is(room: int) -> None:
    tokenizer = bpe_tokenizer(CHATML)
    whole = tokenise(tokenizer)
    limits = Limits(len(whole.prompt) + room)
    row = make_rows([Demonstration("d", PROMPT, REPLY)], ChatTokens(tokenizer, limits)).table[0]
    assert row.branches == (tuple(whole.completions[0][:room]),)
    assert list(row.scored(0)) == [n for a, z in scored_spans(whole) for n in range(a, z) if n < room]
    assert len(row.scored(0)) > 0


def test_mismatched_completions_keep_their_turns() -> None:
    tokenizer = bpe_tokenizer(CHATML)
    tokens = ChatTokens(tokenizer, Limits(4096))
    other = (Message("user", "hello"),)
    examples = [Labelled("a", PROMPT, REPLY, True), Labelled("b", other, "bad", False)]
    rows = make_rows(examples, tokens, mismatched_seed=0).table
    after = tokenise(tokenizer, prompt=other)
    assert rows[1].branches == (tuple(tokens.completion("bad", other)), tuple(after.completions[0]))
    assert rows[1].context == ((), tuple(after.context[0]))
    few, _ = few_rows(examples, [examples[1], examples[0]], tokens, lambda _: "")
    assert [(row.branches, row.context) for row in few] == [(row.branches, row.context) for row in rows[:]]
