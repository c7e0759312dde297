"""The rule: a completion is what the template writes after its own prompt, with ids that continue the prompt's."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from halos.data.records.record import Message, Prompt, json_text
from halos.data.rows.boundary import Boundary
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.exchanges import Exchange
from halos.data.rows.templates import with_control, with_defaults
from tests.data.rows.traits import ALPHABET, CALLS, EXACT, FAMILIES, FORGETS, OPENS, TEXT_ENDS, THINKS, TRAITS
from tests.tiny import CHATML, GOOD, bpe_tokenizer

TURNS = (Message("system", "be"), Message("user", "a"), Message("assistant", "b"), Message("user", "c\n"))
PROMPTS: list[Prompt] = ["ab:", TURNS]
REPLIES = ["abc", " ab ", "\na", "a. b\n\n", "</think", "", "bad"]


def chat(tokenizer: Any) -> ChatTokens:
    return ChatTokens(tokenizer, Limits(4096))


def served(tokenizer: Any, prompt: Prompt, *more: dict[str, Any]) -> str:
    """What a server renders, by transformers alone; with turns after the prompt, the whole conversation."""
    messages = [Message("user", prompt)] if isinstance(prompt, str) else prompt
    turns = [{"role": one.role, "content": one.content} for one in messages]
    return str(tokenizer.apply_chat_template([*turns, *more], tokenize=False, add_generation_prompt=not more))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def decode(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def check(family: str, trait: str, prompt: Prompt, reply: str) -> None:
    """One exchange against the definition of the rule."""
    template = with_defaults(TRAITS[trait].template, TRAITS[trait].values)
    tokenizer = FAMILIES[family](template)
    tokens = chat(tokenizer)
    start = served(tokenizer, prompt)
    whole = start + TRAITS[trait].completion(reply)
    assert served(tokenizer, prompt, {"role": "assistant", "content": reply}).startswith(whole)
    ids, completion = tokens.prompt(prompt), tokens.completion(reply, prompt)
    assert ids == ids_of(tokenizer, start), "a server's ids"
    if (expected := ids_of(tokenizer, whole))[: len(ids)] == ids:
        assert ids + completion == expected, "the ids of the whole text, where they split at the boundary"
    elif family in EXACT or family.startswith("Metaspace"):
        assert decode(tokenizer, ids + completion) == decode(tokenizer, expected)
    if family in EXACT:
        assert decode(tokenizer, ids + completion) == whole
    assert completion[-1] == tokenizer.convert_tokens_to_ids(TRAITS[trait].closing.strip())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trait", TRAITS)
def test_a_completion_is_what_the_template_writes_after_its_prompt(trait: str, family: str) -> None:
    for prompt in PROMPTS:
        for reply in REPLIES:
            check(family, trait, prompt, reply)


texts = st.text(ALPHABET, max_size=12)


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    turns = [Message("system", draw(texts))] * draw(st.booleans())
    for _ in range(draw(st.integers(0, 2))):
        turns += [Message("user", draw(texts)), Message("assistant", draw(texts))]
    return (*turns, Message("user", draw(texts)))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(trait=st.sampled_from(sorted(TRAITS)), prompt=prompts(), reply=texts)
def test_the_rule_holds_for_any_conversation(family: str, trait: str, prompt: Prompt, reply: str) -> None:
    check(family, trait, prompt, reply)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_space_before_a_completion_that_has_none(family: str) -> None:
    tokenizer = FAMILIES[family](TRAITS["plain markers"].template)
    first = tokenizer.convert_ids_to_tokens(chat(tokenizer).completion("bad", "hi"))[0]
    assert not first.startswith(("▁", "Ġ"))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_template_a_completion_continues_its_prompt(family: str) -> None:
    tokenizer = FAMILIES[family]()
    tokens = chat(tokenizer)
    for prompt, reply in (("abc a", "bc"), ("a: ", "ab"), ("ab\n", "\nab"), ("a", " b")):
        ids = ids_of(tokenizer, prompt)
        assert tokens.prompt(prompt) == ids
        completion = tokens.completion(reply, prompt)
        assert completion[-1] == tokenizer.eos_token_id
        if family in EXACT:
            assert decode(tokenizer, ids + completion[:-1]) == prompt + reply


# Turns of other kinds


CALL = Message("assistant", "", json_text({"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}))


def test_a_reply_that_is_a_tool_call_ends_with_the_token_that_ends_it() -> None:
    tokenizer = bpe_tokenizer(CALLS)
    ids = chat(tokenizer).completion((CALL,), "a")
    assert decode(tokenizer, ids) == '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|eot|>'
    assert decode(tokenizer, chat(tokenizer).completion("b", "a")) == "b<|im_end|>"


def test_a_completion_of_several_turns_is_all_that_follows_the_prompt() -> None:
    tokenizer = bpe_tokenizer(CALLS)
    turns = (CALL, Message("tool", "7"), Message("assistant", "b"))
    text = decode(tokenizer, chat(tokenizer).completion(turns, "a"))
    assert text.startswith("<tool_call>")
    assert text.endswith("</tool_call><|eot|><|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\nb<|im_end|>")
    back = (turns[2], Message("user", "c"), CALL)
    assert decode(tokenizer, chat(tokenizer).completion(back, "a")).endswith("</tool_call><|eot|>")


def test_earlier_thoughts_that_the_template_drops_are_refused() -> None:
    said = [Message("assistant", text, json_text({"reasoning_content": "hm"})) for text in "ab"]
    turns = (said[0], Message("user", "c"), said[1])
    with pytest.raises(ValueError, match=r"it is the last, found 1 of 1 examples .* \(x\): after .* '<think"):
        chat(bpe_tokenizer(THINKS)).completion(turns, "x", where="x")
    # Where the prompt has opened a block that the first reply then lacks, the template does not continue it.
    with pytest.raises(ValueError, match=r"found 1 of 1 examples where it does not \(x\): after .* follows '<think>"):
        chat(bpe_tokenizer(OPENS)).completion(turns, "x", where="x")


def test_a_template_that_closes_turns_with_text_leaves_eos() -> None:
    tokenizer = bpe_tokenizer(TEXT_ENDS)
    assert decode(tokenizer, chat(tokenizer).completion("b\n", "a")) == "b\n</s>"


def test_a_token_that_is_not_marked_as_special_can_end_a_turn() -> None:
    tokenizer = bpe_tokenizer(CHATML.replace("<|im_end|>", "<|stop|>"))
    tokenizer.add_tokens(["<|stop|>"])
    assert decode(tokenizer, chat(tokenizer).completion("b", "a")) == "b<|stop|>"


# Tokenising only the end of a prompt


def test_only_what_follows_the_last_special_token_is_tokenised_again() -> None:
    tokenizer = bpe_tokenizer(CHATML)
    boundary, text = Boundary(tokenizer), served(tokenizer, "hello world")
    context = boundary.context(text, ids_of(tokenizer, text))
    assert (context.text, context.safe) == ("<|im_start|>assistant\n", True)
    assert context.ids == ids_of(tokenizer, context.text)
    plain = boundary.context("hello", [1, 2])
    assert (plain.text, plain.ids, plain.safe) == ("hello", [1, 2], False)
    assert not boundary.context(text, [7, 7, 7]).safe, "ids that do not end with those of the last part"
    tokenizer.split_special_tokens = True
    assert not Boundary(tokenizer).context(text, ids_of(tokenizer, text)).safe


@pytest.mark.parametrize("family", FAMILIES)
def test_control_text_ends_the_prompt_and_the_completion_continues_after_it(family: str) -> None:
    for template in (CHATML, TRAITS["spaces"].template, TRAITS["plain markers"].template):
        tokenizer = FAMILIES[family](template)
        tokens = chat(tokenizer)
        conditioned = FAMILIES[family](with_control(template, GOOD))
        start, ids = served(conditioned, "ab"), tokens.prompt("ab", GOOD)
        assert ids == ids_of(conditioned, start) == chat(conditioned).prompt("ab")
        for reply in REPLIES:
            rest = served(tokenizer, "ab", {"role": "assistant", "content": reply})[len(served(tokenizer, "ab")) :]
            end = tokens.tokenizer.convert_ids_to_tokens(tokens.end_of_turn)
            whole = start + rest[: rest.rindex(end) + len(end)]  # type: ignore[arg-type]
            completion = tokens.completion(reply, "ab", GOOD)
            assert ids + completion == ids_of(tokenizer, whole)
            assert chat(conditioned).completion(reply, "ab") == completion, "also where the exported template writes it"


def test_the_text_of_a_reply_is_what_the_template_writes_again() -> None:
    for trait in ("think block inserted", "channel header", "no generation prompt", "none"):
        tokens = chat(bpe_tokenizer(TRAITS[trait].template))
        assert tokens.text(tokens.completion("hello world", "a")) == "hello world", trait
    tokens = chat(bpe_tokenizer(TRAITS["channel header"].template))
    other = ids_of(tokens.tokenizer, f"final{GOOD} words<|eot|>")
    assert tokens.text(other) == "final words", "without special tokens, as a server returns it"


def test_many_exchanges_are_those_of_each() -> None:
    rng = random.Random(0)
    for trait in TRAITS.values():
        tokens = chat(bpe_tokenizer(trait.template))
        exchanges = [
            Exchange(f"{n}", rng.choice(PROMPTS), (rng.choice(REPLIES), rng.choice(REPLIES)), rng.choice(("", GOOD)))
            for n in range(20)
        ]
        for one, found in zip(exchanges, tokens.tokenise(exchanges), strict=True):
            assert found.prompt == tokens.prompt(one.prompt)
            assert found.completions == [tokens.completion(reply, one.prompt, one.control) for reply in one.replies]


# Which template


def test_a_template_that_does_not_continue_its_prompt_is_refused_with_what_helps() -> None:
    with pytest.raises(
        ValueError, match=r"^data: expected the chat template to write every prompt the same way"
    ) as error:
        chat(bpe_tokenizer(FORGETS)).completion("world", "a", where="f:2#0")
    for words in (
        "found 1 of 1 examples where it does not (f:2#0): after '",
        "assistant\\n' follows '<think>\\n' in the prompt alone, 'world<|im_end|>\\n' with the reply",
        "set model.chat_template_kwargs.enable_thinking=false, or choose another template with model.chat_template=…",
        "put the reasoning that the template expects into the data",
    ):
        assert words in str(error.value)
    tokenizer = bpe_tokenizer(with_defaults(FORGETS, {"enable_thinking": False}))
    assert decode(tokenizer, chat(tokenizer).completion("world", "a")) == "world<|im_end|>"


def test_of_several_templates_the_default_is_used() -> None:
    several: Any = {"default": CHATML, "tool_use": TRAITS["channel header"].template}
    one, other = chat(bpe_tokenizer(several)), chat(bpe_tokenizer(CHATML))
    assert one.prompt("a") == other.prompt("a")
    assert one.completion("b", "a") == other.completion("b", "a")
    with pytest.raises(ValueError, match=r"templates rag, tool_use and none named default"):
        chat(bpe_tokenizer({"rag": CHATML, "tool_use": CHATML}))  # type: ignore[arg-type]


def test_the_date_is_in_the_key_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    from halos.data.rows import rendering

    template = TRAITS["dated"].template
    monkeypatch.setattr(rendering, "today", lambda: datetime.date(2026, 3, 5))
    tokens = chat(bpe_tokenizer(template))
    assert "Today is 05 Mar 2026." in decode(tokens.tokenizer, tokens.prompt("a"))
    monkeypatch.setattr(rendering, "today", lambda: datetime.date(2026, 3, 6))
    later = chat(bpe_tokenizer(template))
    assert later.key != tokens.key
    assert "Today is 05 Mar 2026." in decode(tokens.tokenizer, tokens.prompt("a")), "within a run it is one"


# Texts that carry their markup


def rendered(tokenizer: Any) -> ChatTokens:
    return ChatTokens(tokenizer, Limits(4096), "rendered")


def test_rendered_texts_are_taken_as_they_are() -> None:
    tokenizer = bpe_tokenizer(CHATML)
    tokens, prompt = rendered(tokenizer), served(tokenizer, "a")
    assert tokens.prompt(prompt) == ids_of(tokenizer, prompt) == chat(tokenizer).prompt("a")
    expected = ids_of(tokenizer, "b<|im_end|>")
    for reply in ("b<|im_end|>", "b", "b<|im_end|>\n"):
        assert tokens.completion(reply, prompt) == expected, "one end, never two"
    assert decode(tokenizer, tokens.completion("b</s>", prompt)) == "b</s>"
    assert tokens.key != chat(tokenizer).key
    with pytest.raises(ValueError, match=r"^x: expected a text as prompt with data\.text=rendered, found turns"):
        tokens.prompt(PROMPTS[1], where="x")


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_rendered_prompt_has_one_bos(template: str | None) -> None:
    tokenizer = bpe_tokenizer(template, bos=True)
    for prompt in ("<s>a", "a"):
        assert rendered(tokenizer).prompt(prompt) == ids_of(tokenizer, "<s>a")


def test_another_kind_of_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^data\.text: expected plain or rendered, found 'raw'"):
        ChatTokens(bpe_tokenizer(), Limits(9), "raw")
