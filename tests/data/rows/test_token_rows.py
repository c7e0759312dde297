"""Rows: which ids each branch holds, what was cut, and whose completion stands in for y'."""

import random
from collections import Counter
from typing import Any

import pytest

from halos.data.records.record import Message
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.mismatch import derangement
from halos.data.rows.tokenise import few_rows, make_rows
from halos.data.views.examples import Demonstration, Labelled, Pair, Scored
from tests.tiny import BOS, CHATML, EOS, GOOD, NO_SYSTEM, bpe_tokenizer, word_tokenizer

TOKENIZER = word_tokenizer(bos=True)


def chat(max_length: int = 64, max_prompt_length: int | None = None, tokenizer: Any = TOKENIZER) -> ChatTokens:
    return ChatTokens(tokenizer, Limits(max_length, max_prompt_length))


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.convert_tokens_to_ids(text.split()))  # type: ignore[arg-type]


# Derangement


def layouts(count: int) -> list[list[int]]:
    """Random group layouts of every kind: many small groups, few large ones, exact halves, a majority."""
    rng = random.Random(0)
    made = [[0, 1], [0, 0, 1, 1], [0, 1, 0, 1, 0, 1], list(range(7)), [0, 0, 0, 1, 1, 2]]
    while len(made) < count:
        size, kinds = rng.randint(2, 40), rng.randint(2, 12)
        weights = [rng.random() ** 3 for _ in range(kinds)]
        groups = rng.choices(range(kinds), weights, k=size)
        if len(set(groups)) > 1:
            made.append(groups)
    return made


LAYOUTS = layouts(300)


def has_majority(groups: list[int]) -> bool:
    return 2 * max(Counter(groups).values()) > len(groups)


def test_the_layouts_are_of_both_kinds() -> None:
    assert 50 < sum(map(has_majority, LAYOUTS)) < 250


def test_no_partner_has_the_same_prompt() -> None:
    for seed, groups in enumerate(LAYOUTS):
        partner = derangement(groups, seed)
        assert len(partner) == len(groups)
        assert all(groups[i] != groups[p] for i, p in enumerate(partner)), groups


def test_partners_are_a_permutation_unless_one_prompt_has_the_majority() -> None:
    for seed, groups in enumerate(LAYOUTS):
        if not has_majority(groups):
            assert sorted(derangement(groups, seed)) == list(range(len(groups))), groups


def test_a_majority_is_spread_over_the_others() -> None:
    groups = [0] * 60 + list(range(1, 21))
    partner = derangement(groups, 0)
    of_majority = {partner[i] for i in range(60)}
    assert of_majority <= set(range(60, 80))
    assert len(of_majority) > 10
    assert {groups[partner[i]] for i in range(60, 80)} > {0}, "the others may also get each other's"


def test_partners_are_determined_by_the_seed() -> None:
    for groups in LAYOUTS:
        assert derangement(groups, 3) == derangement(groups, 3)


@pytest.mark.parametrize("groups", [list(range(30)), [i // 3 for i in range(30)], [0] * 20 + list(range(1, 11))])
def test_partners_differ_across_seeds(groups: list[int]) -> None:
    drawn = {tuple(derangement(groups, seed)) for seed in range(20)}
    assert len(drawn) == 20


def test_every_other_prompt_can_be_drawn() -> None:
    assert {derangement([0, 1, 2, 3], seed)[0] for seed in range(50)} == {1, 2, 3}


def test_one_prompt_alone_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="at least two different prompts, found one"):
        derangement([4, 4, 4], 0)


# Rows of each view


@pytest.mark.parametrize(
    ("example", "branches", "desirable", "score"),
    [
        (Demonstration("x#0", "a b", "c"), (("c", EOS),), None, None),
        (Labelled("x#0", "a b", "c", True), (("c", EOS),), True, None),
        (Labelled("x#0", "a b", "c", False), (("c", EOS),), False, None),
        (Pair("x#0", "a b", "c", "d d"), (("c", EOS), ("d", "d", EOS)), None, None),
        (Scored("x#0", "a b", "c", 0.5), (("c", EOS),), True, 0.5),
        (Scored("x#0", "a b", "c", -0.5), (("c", EOS),), False, -0.5),
        (Scored("x#0", "a b", "", 0.0), ((EOS,),), False, 0.0),
    ],
)
def test_a_row_holds_prompt_and_branches(example: Any, branches: Any, desirable: Any, score: Any) -> None:
    (row,) = make_rows([example], chat()).table
    assert (row.id, row.group, row.prompt) == ("x#0", 0, ids(f"{BOS} a b"))
    assert row.branches == tuple(ids(" ".join(branch)) for branch in branches)
    assert (row.desirable, row.score) == (desirable, score)


def test_examples_of_one_prompt_share_a_group() -> None:
    prompts: list[Any] = ["a", "b", (Message("user", "a"),), "c", "b"]
    rows = make_rows([Demonstration(f"x#{n}", p, "d") for n, p in enumerate(prompts)], chat(tokenizer=TOKENIZER)).table
    assert [row.group for row in rows] == [0, 1, 0, 2, 1]


def test_prompts_that_begin_with_the_same_user_turn_are_one_conversation() -> None:
    first, said, more = (Message(role, text) for role, text in (("user", "a"), ("assistant", "b"), ("user", "c")))
    system = Message("system", "d")
    prompts: list[Any] = [(first,), (more,), (first, said, more), "a", (system, first), (first, said, first)]
    made = make_rows([Demonstration(f"x#{n}", p, "d") for n, p in enumerate(prompts)], chat(tokenizer=TOKENIZER)).table
    assert made.conversations.tolist() == [0, 1, 0, 0, 2, 0]
    assert made.groups.tolist() == [0, 1, 2, 0, 3, 4]


def test_no_examples_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="at least one example, found none"):
        make_rows([], chat())


def test_control_text_depends_on_the_label_and_is_not_scored() -> None:
    examples = [Labelled("x#0", "a", "b", True), Labelled("x#1", "a", "c", False)]
    made = make_rows(examples, chat(), control=lambda label: GOOD if label else "")
    good, plain = made.table
    assert (good.prompt, good.branches) == (ids(f"{BOS} a {GOOD}"), (ids(f"b {EOS}"),))
    assert (plain.prompt, plain.branches) == (ids(f"{BOS} a"), (ids(f"c {EOS}"),))
    assert examples == [Labelled("x#0", "a", "b", True), Labelled("x#1", "a", "c", False)]
    assert make_rows(examples, chat(), control=lambda label: GOOD if label else "").table == made.table


# Limits


def test_what_was_cut_is_counted() -> None:
    examples = [
        Pair("x#0", "a a a a", "b b b", "c"),  # prompt to 3 tokens, chosen to 2
        Pair("x#1", "a", "b", "c c c c c c"),  # rejected to 3
        Pair("x#2", "a", "b", "c"),
    ]
    made = make_rows(examples, chat(5, 3))
    assert made.report == {"prompts truncated": 1, "completions truncated": 2}
    assert made.table[0].prompt == ids(f"{BOS} a a")
    assert made.table[0].branches == (ids("b b"), ids(f"c {EOS}"))
    assert made.table[1].branches == (ids(f"b {EOS}"), ids("c c c"))
    assert len(made) == 3


def test_nothing_cut_is_nothing_reported() -> None:
    assert make_rows([Pair("x#0", "a", "b", "c")], chat()).report == {}


def test_a_prompt_over_the_limit_is_an_error_naming_the_example() -> None:
    examples = [Demonstration("x#0", "a", "b"), Demonstration("f.jsonl:2#0", "a a a a", "b")]
    with pytest.raises(ValueError, match=r"^f\.jsonl:2#0: .*shorter than data\.max_length = 5 tokens, found 5"):
        make_rows(examples, chat(5))


def test_a_role_that_the_template_refuses_is_an_error() -> None:
    example = Demonstration("f.jsonl:3#0", (Message("system", "a"), Message("user", "b")), "c")
    with pytest.raises(ValueError, match="System role not supported"):
        make_rows([example], chat(tokenizer=bpe_tokenizer(NO_SYSTEM)))


@pytest.mark.parametrize("template", [None, CHATML])
def test_no_row_is_longer_than_the_limit_or_without_something_to_score(template: str | None) -> None:
    rng = random.Random(1)
    tokens = chat(30, 22, bpe_tokenizer(template, bos=True))
    texts = [" ".join(rng.choices(["good", "bad", "hello"], k=rng.randint(0, 20))) for _ in range(80)]
    examples = [Pair(f"x#{n}", f"p {texts[n]}", texts[n + 20], texts[n + 40]) for n in range(40)]
    for row in make_rows(examples, tokens, mismatched_seed=0).table:
        assert 1 <= len(row.prompt) <= 22
        assert len(row.branches) == 3
        for branch in row.branches:
            assert 1 <= len(branch) <= 30 - len(row.prompt)


# Mismatched completions


def test_the_last_branch_is_another_prompts_completion() -> None:
    examples = [
        Labelled(f"x#{n}", "abcd"[n // 2], f"{'hello' if n % 2 else 'world'} {'abcd'[n // 2]}", True) for n in range(8)
    ]
    plain = make_rows(examples, chat()).table
    rows = make_rows(examples, chat(), mismatched_seed=5).table
    partner = derangement([row.group for row in plain], 5)
    assert [row.branches for row in rows] == [
        (p.branches[0], plain[q].branches[0]) for p, q in zip(plain, partner, strict=True)
    ]
    assert all(row.branches[1][1] != row.prompt[-1] for row in rows)
    assert [(r.id, r.group, r.prompt, r.desirable) for r in rows] == [
        (r.id, r.group, r.prompt, r.desirable) for r in plain
    ]


def test_the_mismatched_completion_is_cut_to_the_room_behind_its_new_prompt() -> None:
    examples = [
        Labelled("short#0", "a", "b b b b b", True),  # 2 prompt tokens leave room for 6 of 8
        Labelled("long#0", "a a a a", "c c c c c", False),  # 5 leave room for 3
    ]
    short, long = make_rows(examples, chat(8), mismatched_seed=0).table
    assert short.branches == (ids(f"b b b b b {EOS}"), ids(f"c c c c c {EOS}")), "whole: not as cut as behind its own"
    assert long.branches == (ids("c c c"), ids("b b b"))


def test_cutting_the_mismatched_completion_is_not_reported_as_a_loss() -> None:
    examples = [Labelled("short#0", "a", "b b b b b", True), Labelled("long#0", "a a a a", "c", False)]
    assert make_rows(examples, chat(8), mismatched_seed=0).report == {}


def test_a_mismatched_completion_needs_a_second_prompt() -> None:
    examples = [Labelled(f"x#{n}", "a", "b", True) for n in range(3)]
    with pytest.raises(ValueError, match="at least two different prompts"):
        make_rows(examples, chat(), mismatched_seed=0)


def test_few_rows_are_those_of_many() -> None:
    examples = [Labelled(f"{n}", f"{'a ' * (1 + n % 3)}{n % 2}", "b " * (1 + n % 5), n % 2 == 0) for n in range(12)]
    tokens, control = chat(6, 2), lambda label: GOOD if label else ""
    rows = make_rows(examples, tokens, control=control, mismatched_seed=0)
    partners = [examples[index] for index in rows.table.partners]
    found, cut = few_rows(examples[3:8], partners[3:8], tokens, control)
    assert [(row.id, row.prompt, row.branches, row.desirable) for row in found] == [
        (row.id, row.prompt, row.branches, row.desirable) for row in rows.table[3:8]
    ]
    alone, _ = few_rows(examples[3:8], [], tokens, control)
    assert [row.branches for row in alone] == [row.branches[:1] for row in found]
    assert +cut == make_rows(examples[3:8], tokens, control=control).report > Counter()


def test_few_rows_find_partners_of_the_same_name() -> None:
    examples = [Labelled("x#0", prompt, f"{prompt} b", True) for prompt in "abcd"]
    found, _ = few_rows(examples[:3], examples[1:], chat(), lambda _: "")
    assert [row.branches for row in found] == [
        (ids(f"{one} b {EOS}"), ids(f"{other} b {EOS}")) for one, other in zip("abc", "bcd", strict=True)
    ]
