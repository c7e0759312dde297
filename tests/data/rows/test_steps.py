"""Steps of completions as rows: which tokens are whose, what is dropped, and what the mismatched ones are."""

from __future__ import annotations

from typing import Any

import pytest

from halos.data.records.record import Message
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.exchanges import Exchange, Tokenised
from halos.data.rows.token_rows import Row, TokenRows
from halos.data.rows.tokenise import few_rows, make_rows
from halos.data.views.examples import Labelled
from tests.data.rows.traits import CALLS, EXACT, FAMILIES, TEXT_ENDS, TRAITS
from tests.tiny import CHATML, GOOD, bpe_tokenizer

STEPS = ("ab c.", "\n\nabc", " bad, a", "-b.\n", "  ab")
REPLY = "".join(STEPS)
STOPS = tuple(len("".join(STEPS[:n])) for n in range(len(STEPS) + 1))


PROMPT = (Message("user", "a"),)


def tokenise(tokenizer: Any, reply: str, stops: tuple[int, ...]) -> Tokenised:
    tokens = ChatTokens(tokenizer, Limits(4096))
    (made,) = tokens.tokenise([Exchange("x", PROMPT, (reply,), "", stops)])
    tokens.check(made.refusals, 1)
    return made


def text(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def test_a_token_belongs_to_the_step_of_its_last_character() -> None:
    tokenizer = bpe_tokenizer(CHATML)
    steps = ("hello wor", "ld.", " bad and", "\n\n", "good again")
    stops = tuple(len("".join(steps[:n])) for n in range(len(steps) + 1))
    made = tokenise(tokenizer, "".join(steps), stops)
    (ids,) = made.completions
    assert [text(tokenizer, [one]) for one in ids] == [
        *("hello", " world", ".", " bad", " and", "\n", "\n", "go", "od", " again", "<|im_end|>")
    ]
    # " world" is of the first two steps, and ends in the second.
    assert made.stops == [0, 1, 3, 5, 7, 10]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trait", [*(name for name in TRAITS if not TRAITS[name].values), "calls", "text ends"])
def test_each_token_of_a_rendered_reply_is_of_one_step(trait: str, family: str) -> None:
    template = {"calls": CALLS, "text ends": TEXT_ENDS}.get(trait) or TRAITS[trait].template
    tokenizer = FAMILIES[family](template)
    tokens = ChatTokens(tokenizer, Limits(4096))
    made = tokenise(tokenizer, REPLY, STOPS)
    (ids,) = made.completions
    assert ids == tokens.completion(REPLY, PROMPT)  # of the whole reply: no piece of it is tokenised by itself
    stops = [*made.stops[:-1], len(ids)]
    assert stops == sorted(stops)
    assert stops[0] == 0
    if family in EXACT:
        # Another way: by decoding, from the end of the prompt.
        before = len(text(tokenizer, made.prompt))
        ends = [len(text(tokenizer, made.prompt + ids[: n + 1])) - before for n in range(len(ids))]
        trait_of = TRAITS.get(trait)
        opening = len(trait_of.opening) if trait_of else 0
        assert stops[1:-1] == [sum(end <= opening + stop for end in ends) for stop in STOPS[1:-1]]


def test_a_template_that_trims_moves_the_steps() -> None:
    tokenizer = bpe_tokenizer(TRAITS["trims"].template)
    made = tokenise(tokenizer, "  hello.  ", (0, 2, 7, 10))
    assert [text(tokenizer, [one]) for one in made.completions[0]] == ["hello", ".", "<|im_end|>"]
    assert made.stops == [0, 0, 1, 2]


def test_a_template_that_changes_a_reply_is_refused() -> None:
    tokenizer = bpe_tokenizer(CHATML.replace("message['content']", "message['content'] | upper"))
    with pytest.raises(
        ValueError, match=r"^x: expected a chat template that writes a reply with labels of steps as it"
    ):
        tokenise(tokenizer, "hello", (0, 5))


def test_a_slow_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = bpe_tokenizer(CHATML)
    tokens = ChatTokens(tokenizer, Limits(4096))
    monkeypatch.setattr(type(tokens._boundary), "backend", None)
    with pytest.raises(ValueError, match="tokenizer: expected a fast one with labels of steps"):
        tokens.tokenise([Exchange("x", "hello", ("good",), "", (0, 4))])


def labelled(name: str, prompt: str, reply: str, *stops: int, desirable: bool = True) -> list[Labelled]:
    spans = list(zip((0, *stops), stops, strict=False))
    return [Labelled(f"{name}#{n}", prompt, reply, desirable, 1 / len(spans), span) for n, span in enumerate(spans)]


HELLO = labelled("a", "hello", "hello world. bad and again", 12, 16, 26)
GOOD_DAY = labelled("b", "good", "good and bad", 4, 12, desirable=False)
WHOLE = [Labelled("c#0", "world", "good", True)]


def rows_of(examples: list[Labelled], limit: int = 4096, template: Any = CHATML, **options: Any) -> TokenRows:
    return make_rows(examples, ChatTokens(bpe_tokenizer(template), Limits(limit)), **options).table.views[0]


def words(row: Row, branch: int) -> tuple[str, str]:
    """What is before the scored tokens of a branch, and these."""
    tokenizer, ids, scored = bpe_tokenizer(), row.branches[branch], row.scored(branch)
    assert [*scored] == [*range(scored[0], len(ids))]
    return text(tokenizer, ids[: scored[0]]), text(tokenizer, ids[scored[0] :])


def test_a_row_ends_with_its_step_of_which_alone_the_tokens_are_scored() -> None:
    rows = rows_of([*HELLO, *GOOD_DAY, *WHOLE])
    assert [words(row, 0) for row in rows] == [
        ("", "hello world."),
        ("hello world.", " bad"),
        ("hello world. bad", " and again<|im_end|>"),
        ("", "good"),
        ("good", " and bad<|im_end|>"),
        ("", "good<|im_end|>"),
    ]
    assert [row.desirable for row in rows] == [True, True, True, False, False, True]
    assert [row.weight for row in rows] == pytest.approx([1 / 3] * 3 + [1 / 2] * 2 + [1.0])
    assert [row.group for row in rows] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_mismatched_step_is_another_prompts_step_after_the_steps_before_it(template: Any) -> None:
    """Without a template the ids depend on the prompt, and a table of their own has the mismatched ones."""
    examples = [*HELLO, *GOOD_DAY, *WHOLE]
    rows = rows_of(examples, template=template, mismatched_seed=0)
    assert rows.partners is not None
    assert (rows._mismatched is None) is (template is not None)
    for row, partner in zip(rows, rows.partners.tolist(), strict=True):
        assert words(row, 1) == words(rows[partner], 0)
        assert row.group != rows[partner].group
    partners = [examples[n] for n in rows.partners.tolist()]
    few, _ = few_rows(examples, partners, ChatTokens(bpe_tokenizer(template), Limits(4096)), lambda _: "")
    assert [(one.branches, one.context) for one in few] == [(one.branches, one.context) for one in rows]


def test_steps_that_the_limits_cut_are_found() -> None:
    examples = [*HELLO, *GOOD_DAY, *WHOLE]
    whole = rows_of(examples)
    room = len(whole[1].branches[0])  # up to " bad"
    rows = rows_of(examples, limit=len(whole[0].prompt) + room)
    cut = rows.unlearnable_steps()["steps cut by data.max_length left out"]
    assert cut.tolist()[:3] == [False, False, True]
    limit = len(whole[0].prompt) + room
    assert cut.tolist() == [len(row.prompt) + len(row.branches[0]) > limit and "c#" not in row.id for row in whole]


def test_a_mismatched_step_that_is_cut_has_as_many_scored_tokens_before_the_limit() -> None:
    long = labelled("d", "hello again and again. hello again and again.", "bad.", 4)
    rows = rows_of([*HELLO, *long], mismatched_seed=0)
    room = len(rows[3].branches[0]) + 1
    limit = len(rows[3].prompt) + room
    few, _ = few_rows([*long] * 3, HELLO, ChatTokens(bpe_tokenizer(CHATML), Limits(limit)), lambda _: "")
    whole = [rows[n] for n in range(3)]
    for row, other in zip(few, whole, strict=True):
        fits = min(room, len(other.branches[0]))
        assert len(row.branches[1]) == fits
        assert [*row.scored(1)] == [*range(max(0, fits - len(other.scored(0))), fits)]


def test_a_step_within_one_token_has_none_of_its_own() -> None:
    rows = rows_of(labelled("a", "hello", "hello world", 3, 11))
    without = rows.unlearnable_steps()["steps without a token of their own left out"]
    assert without.tolist() == [True, False]


def test_a_control_token_is_before_the_steps() -> None:
    rows = rows_of(HELLO, control=lambda _: GOOD)
    assert [row.prompt[-1] for row in rows] == [bpe_tokenizer().convert_tokens_to_ids(GOOD)] * 3
    assert words(rows[1], 0) == ("hello world.", " bad")
