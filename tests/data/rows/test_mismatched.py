"""KTO's mismatched completions: their ids are those of the text after the prompt that they are paired with."""

from pathlib import Path
from typing import Any

import pytest

from halos.data.records.record import Message
from halos.data.rows import tokenise
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.tokenise import few_rows, make_rows
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.store.arrow import Store
from halos.data.views.derive import VIEWS
from halos.data.views.examples import Labelled
from tests.data.rows.traits import FAMILIES, TRAITS, TRIMS
from tests.tiny import CHATML, GOOD, bpe_tokenizer

COUNTS = CHATML.replace(
    "{{ message['content'] }}",
    "{{ '[%d] ' % messages[0]['content'] | length if message['role'] == 'assistant' }}{{ message['content'] }}",
)
"""Writes the length of the first turn before the reply: a completion that depends on its prompt."""
_MARK = "{{ message['role'] }}\n"
AFTER_TOOLS = CHATML.replace(
    "assistant\n{% endif", "assistant\n{{ '!' if messages[-1]['role'] == 'tool' }}{% endif"
).replace(_MARK, _MARK + "{{ '!' if message['role'] == 'assistant' and messages[loop.index0 - 1]['role'] == 'tool' }}")
"""Its generation prompt differs after a tool's turn."""


def chat(tokenizer: Any) -> ChatTokens:
    return ChatTokens(tokenizer, Limits(512))


def examples(*, tools: bool = False) -> list[Labelled]:
    prompts: list[Any] = ["a" * (1 + n) for n in range(6)]
    if tools:
        prompts[3:] = [(Message("user", "a"), Message("tool", str(n))) for n in range(3)]
    return [Labelled(f"x#{n}", prompt, f" b{n} ", n % 2 == 0) for n, prompt in enumerate(prompts)]


def check(given: list[Labelled], tokens: ChatTokens, control: Any = lambda _: "") -> None:
    made = make_rows(given, tokens, control=control, mismatched_seed=0).table
    partners = [given[index] for index in made.partners]
    for one, other, row in zip(given, partners, made, strict=True):
        assert row.branches[0] == tuple(tokens.completion(one.completion, one.prompt, control(one.desirable)))
        assert row.branches[1] == tuple(tokens.completion(other.completion, one.prompt, control(one.desirable)))
    few, _ = few_rows(given[1:4], partners[1:4], tokens, control)
    assert [row.branches for row in few] == [row.branches for row in made[1:4]]
    assert [len(branch) for row in made for branch in row.branches] == [
        int(size) for sizes in zip(*made.sizes(), strict=True) for size in sizes
    ]


@pytest.mark.parametrize("template", [None, CHATML, TRIMS, COUNTS, AFTER_TOOLS, *(t.template for t in TRAITS.values())])
@pytest.mark.parametrize("family", ["byte-level BPE", "Metaspace BPE", "unigram"])
def test_they_are_the_text_after_their_new_prompt(family: str, template: str | None) -> None:
    tokens = chat(FAMILIES[family](template))
    check(examples(), tokens)
    check(examples(), tokens, lambda label: GOOD if label else "")
    check(examples(tools=True), tokens)


@pytest.mark.parametrize(
    ("template", "tools", "again"),
    [
        (CHATML, False, False),
        (TRIMS, False, False),
        (CHATML, True, False),
        (COUNTS, False, True),
        (AFTER_TOOLS, True, True),
        (None, False, True),
    ],
)
def test_they_are_tokenised_again_only_where_they_depend_on_it(
    template: str | None, tools: bool, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    whole = tokenise.token_batch
    monkeypatch.setattr(tokenise, "token_batch", lambda part, *more: asked.append(len(part)) or whole(part, *more))
    make_rows(examples(tools=tools), chat(bpe_tokenizer(template)), mismatched_seed=0)
    assert len(asked) == 1 + again


def test_their_table_is_kept_for_each_seed(tmp_path: Path) -> None:
    file, store = tmp_path / "f.jsonl", Store(tmp_path / "cache")
    file.write_text("".join(f'{{"prompt": "{"a" * n}", "completion": "b{n}", "label": true}}\n' for n in range(1, 9)))

    def made(seed: int) -> Any:
        found = VIEWS["binary"](FeedbackFiles(file).train().records).examples
        return make_rows(found, chat(bpe_tokenizer(COUNTS)), mismatched_seed=seed, store=store).table

    first, again, other = made(0), made(0), made(1)
    assert first == again
    assert first.digest() == again.digest() != other.digest()
    # The first's are in memory, as records without a store have no key; nothing may be mixed up between seeds.
    tokens = chat(bpe_tokenizer(COUNTS))
    for rows in (first, other):
        for index, row in enumerate(rows):
            partner = int(rows.partners[index]) + 1
            assert row.branches[1] == tuple(tokens.completion(f"b{partner}", "a" * (index + 1)))
