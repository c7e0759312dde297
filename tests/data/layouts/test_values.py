"""Words of judgements: what the common ones mean, what a user says they mean, and what is refused."""

import re

import pytest

from halos.data.layouts.values import MEANINGS, OPPOSITES, Values, number_in, plain_word, score_in


@pytest.mark.parametrize(
    "value",
    [
        True,
        1,
        1.0,
        "1",
        "1.0",
        "desirable",
        "+1",
        "True",
        " yes",
        "UP",
        "👍",
        "👍🏽",
        "👍️",
        "Like",
        "thumbs-up",
        "good",
    ],
)
def test_words_for_desirable(value: object) -> None:
    assert Values().label("f:1", "thumb", value) is True


@pytest.mark.parametrize(
    "value",
    [
        False,
        0,
        0.0,
        -1,
        "-1",
        "-1.0",
        "UNDESIRABLE",
        "false",
        "No",
        "down",
        "👎",
        "👎🏿",
        "dislike",
        "thumbs_down",
        "bad",
    ],
)
def test_words_for_undesirable(value: object) -> None:
    assert Values().label("f:1", "thumb", value) is False


@pytest.mark.parametrize("value", [None, 2, 0.5, "", "maybe", [], "5", float("nan"), "9" * 500])
def test_a_value_with_no_meaning_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"^f:1: expected 'thumb' to be true/false.*data\.values\.desirable=\[…\]"):
        Values().label("f:1", "thumb", value)


def test_a_number_that_is_no_label_may_be_a_score() -> None:
    with pytest.raises(ValueError, match=r"a score\? data\.columns\.score=stars"):
        Values().label("f:1", "stars", 4)


def test_no_common_word_has_two_meanings() -> None:
    for one, other in OPPOSITES:
        assert not MEANINGS[one] & MEANINGS[other]
    for words in MEANINGS.values():
        assert {plain_word(word) for word in words} <= words | {"1"}


def test_a_users_word_means_what_the_user_says() -> None:
    values = Values(desirable=["bad"], undesirable=["gut", 5])
    assert values.label("f:1", "x", "BAD") is True
    assert values.label("f:1", "x", "5.0") is False
    assert values.label("f:1", "x", "up") is True  # common words stay
    with pytest.raises(ValueError, match=r"^data\.values: expected 'up' to mean one thing, found it in desirable"):
        Values(desirable=["up"], undesirable=["Up "])


def test_words_that_yaml_reads_as_booleans_are_the_words_that_they_were() -> None:
    values = Values(desirable=[False], undesirable=[True])  # as [no] and [yes] in a YAML file
    assert [values.label("f:1", "rejected?", word) for word in ("no", "off", False, "yes", "on", True)] == [
        True
    ] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("value", "sides", "expected"),
    [
        ("model_a", ("conversation_a", "conversation_b"), (0,)),
        ("B", ("response_a", "response_b"), (1,)),
        ("response_b", ("response_a", "response_b"), (1,)),
        (0, ("response_0", "response_1"), (0,)),
        (1, ("response_0", "response_1"), (1,)),
        (1, ("output_1", "output_2"), (0,)),
        (2.0, ("output_1", "output_2"), (1,)),
        ("right", ("data.answer1", "data.answer2"), (1,)),
        ("tie (bothbad)", ("a", "b"), ()),
    ],
)
def test_which_side_is_better(value: object, sides: tuple[str, str], expected: tuple[int, ...]) -> None:
    assert Values().winner("f:1", "winner", value, sides) == expected


@pytest.mark.parametrize("value", [0, 1, 2, "0", True])
def test_an_index_of_sides_without_numbers_is_not_guessed(value: object) -> None:
    # 1 may be the second side, counted from 0, or the first: whoever collected it has to say.
    with pytest.raises(ValueError, match=r"f:1: expected 'best' to be 'left_text' or .*data\.values\.first=\[…\]"):
        Values().winner("f:1", "best", value, ("left_text", "right_text"))
    assert Values(first=[1], second=[0, 2]).winner("f:1", "best", 1, ("left_text", "right_text")) == (0,)


@pytest.mark.parametrize(
    ("value", "expected"), [(None, None), ("", None), ("4", 4.0), (" 4.50 ", 4.5), (-1, -1.0), ("1e2", 100.0)]
)
def test_scores(value: object, expected: float | None) -> None:
    assert score_in("f:1", "stars", value) == expected


@pytest.mark.parametrize("value", [True, "four", [], 10**400])
def test_what_is_no_score(value: object) -> None:
    with pytest.raises(ValueError, match="f:1: expected 'stars' to be a number"):
        score_in("f:1", "stars", value)


@pytest.mark.parametrize("words", [{"desirable": "up"}, {"first": [["a"]]}, {"tie": [None]}])
def test_lists_of_words(words: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^data\.values\." + re.escape(next(iter(words)))):
        Values(**words)  # type: ignore[arg-type]


def test_a_number_of_many_digits_is_a_word() -> None:
    assert number_in("9" * 401) is None
