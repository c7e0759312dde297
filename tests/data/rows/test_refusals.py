"""What is refused before training: every example is checked, both sides and every kind, and all are counted."""

from pathlib import Path
from typing import Any

import pytest

from halos.data.records.record import Message
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.tokenise import few_rows, make_rows
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.store.arrow import Store
from halos.data.views.derive import VIEWS
from halos.data.views.examples import Demonstration, Example, Labelled, Pair, Scored
from tests.data.rows.traits import FORGETS, OPENS
from tests.tiny import CHATML, GOOD, bpe_tokenizer

# Every reply continues the opened tag but those that say odd.
ODD = OPENS.replace("and loop.last", "and 'odd' not in m['content']")


def chat(template: str | None, text: str = "plain") -> ChatTokens:
    return ChatTokens(bpe_tokenizer(template), Limits(512), text)


def refused(examples: list[Any], tokens: ChatTokens) -> str:
    """The error of the examples, the same one for all of them and for a stream's few."""
    with pytest.raises(ValueError, match=r"^data: ") as error:
        make_rows(examples, tokens)
    with pytest.raises(ValueError, match=r"^data: ") as of_stream:
        few_rows(examples, [], tokens, lambda _: "")
    assert str(of_stream.value) == str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "odd",
    [
        Demonstration("odd", "a", "odd"),
        Labelled("odd", "a", "odd", True),
        Scored("odd", "a", "odd", 0.5),
        Pair("odd", "a", "odd", "b"),
        Pair("odd", "a", "b", "odd"),
        Pair("odd", "a", "odd", "odd"),
    ],
)
def test_every_example_is_checked_on_both_sides_and_of_every_kind(odd: Example) -> None:
    good: list[Example] = [Demonstration(f"x#{n}", "a", "b") for n in range(9)]
    make_rows(good, chat(ODD))
    for place in (0, 4, 9):  # whether it is noticed must not depend on the order of rows
        said = refused([*good[:place], odd, *good[place:]], chat(ODD))
        assert "found 1 of 10 examples where it does not (odd): after " in said


def test_all_are_counted_and_the_first_are_named() -> None:
    examples = [Demonstration(f"x#{n}", "a", "odd" if n % 2 else "b") for n in range(2000)]
    assert "found 1,000 of 2,000 examples where it does not (x#1, x#3, x#5, …): " in refused(examples, chat(ODD))


def test_what_is_refused_is_refused_again_from_the_cache(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text('{"prompt": "a", "completion": "b", "label": true}\n' * 3)
    said = []
    for _ in range(2):
        examples = VIEWS["binary"](FeedbackFiles(file).train().records).examples
        with pytest.raises(ValueError, match="found 3 of 3 examples") as error:
            make_rows(examples, chat(FORGETS), store=Store(tmp_path / "cache"))
        said.append(str(error.value))
    assert said[0] == said[1]
    assert "set model.chat_template_kwargs.enable_thinking=false" in said[0]


@pytest.mark.parametrize(
    ("prompt", "completion", "shown"),
    [
        ("<|im_start|>user\na<|im_end|>", "b", "'<|im_start|>' in the prompt"),
        ("a", "good<|im_end|>", "'<|im_end|>' in the completion"),
        ("a", "x</s>", "'</s>' in the completion"),
        ((Message("system", f"be {GOOD}"), Message("user", "a")), "b", "'<|good|>' in the prompt"),
    ],
)
@pytest.mark.parametrize("template", [None, CHATML])
def test_special_tokens_in_a_text_are_refused(template: str | None, prompt: Any, completion: str, shown: str) -> None:
    examples = [Pair("x#0", "a", "b", "c"), Pair("x#1", prompt, "b", completion), Pair("x#2", prompt, completion, "b")]
    said = refused(examples, chat(template))
    assert f"without special tokens of the tokenizer, found some in 2 of 3 examples (x#1, x#2): {shown}. " in said
    assert "set data.text=rendered if prompts and completions carry their markup already" in said


def test_rendered_texts_may_have_them() -> None:
    prompt = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    (mine,) = make_rows([Pair("x#0", "a", "b", "c")], chat(CHATML)).table
    (row,) = make_rows([Pair("x#0", prompt, "b<|im_end|>", "c")], chat(CHATML, "rendered")).table
    assert (row.prompt, row.branches) == (mine.prompt, mine.branches)


def test_a_tokenizer_that_splits_special_tokens_reads_them_as_text() -> None:
    tokens = chat(None)
    tokens.tokenizer.split_special_tokens = True
    tokens = ChatTokens(tokens.tokenizer, tokens.limits)
    (row,) = make_rows([Demonstration("x#0", "a", "b</s>")], tokens).table
    assert row.branches[0].count(tokens.end_of_turn) == 1
