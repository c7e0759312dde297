"""What the words and numbers of a judgement mean: desirable or not, which of two sides is better, a score."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from halos.data.reading.fields import NUMBER, score_of, wrong

MEANINGS: dict[str, frozenset[str]] = {
    "desirable": frozenset(
        [
            "1",
            "true",
            "yes",
            "y",
            "on",
            "desirable",
            "up",
            "upvote",
            "upvoted",
            "thumb_up",
            "thumbs_up",
            "thumbsup",
            "👍",
            "👍️",
            "+",
            "+1",
            "like",
            "liked",
            "good",
            "great",
            "positive",
            "pos",
            "accept",
            "accepted",
            "correct",
            "helpful",
            "✅",
            "❤",
            "😀",
            "🙂",
            "success",
        ]
    ),
    "undesirable": frozenset(
        [
            "0",
            "-1",
            "false",
            "no",
            "n",
            "off",
            "undesirable",
            "down",
            "downvote",
            "downvoted",
            "thumb_down",
            "thumbs_down",
            "thumbsdown",
            "👎",
            "-",
            "dislike",
            "disliked",
            "bad",
            "poor",
            "negative",
            "neg",
            "reject",
            "rejected",
            "incorrect",
            "wrong",
            "unhelpful",
            "❌",
            "😞",
            "🙁",
            "failure",
        ]
    ),
    "first": frozenset(
        ["a", "left", "first", "model_a", "response_a", "output_a", "answer_a", "completion_a", "side_a"]
    ),
    "second": frozenset(
        ["b", "right", "second", "model_b", "response_b", "output_b", "answer_b", "completion_b", "side_b"]
    ),
    "tie": frozenset(
        ["tie", "tie (bothbad)", "tie (both bad)", "bothbad", "both_bad", "both", "neither", "equal", "same", "draw"]
    ),
}
"""The words that are known for each meaning, as :func:`plain_word` writes them."""
OPPOSITES = (("desirable", "undesirable"), ("first", "second"), ("first", "tie"), ("second", "tie"))
BOOLEANS = {True: ("true", "yes", "y", "on", "1"), False: ("false", "no", "n", "off", "0")}
"""YAML reads ``yes`` and ``on`` as true: each stands for all words that it may have been."""
SKIN_TONES_AND_VARIANTS = re.compile("[\U0001f3fb-\U0001f3ff\ufe0e\ufe0f]")


def plain_word(value: object) -> str:
    """Return a value as the words of :data:`MEANINGS` are written: 1.0 is ``1``, `` Yes`` is ``yes``."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        word = SKIN_TONES_AND_VARIANTS.sub("", value.strip()).casefold().replace("-", "_" if value[:1] != "-" else "-")
        number = number_in(word)
        return word if number is None or word in ("+1",) else plain_word(number)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def number_in(text: str) -> float | None:
    """Return the number that a text writes out; None if it is not a number."""
    # Nobody means a number of hundreds of digits, and one of thousands takes long to convert.
    return float(text) if len(text) <= 400 and NUMBER.fullmatch(text.strip()) else None


@dataclass(frozen=True, slots=True)
class Values:
    """The words that stand for judgements in the files, beside the common ones (:data:`MEANINGS`).

    A word that is listed here means what it is listed for, whatever it commonly means.

    Attributes:
        desirable: words for a desirable completion.
        undesirable: words for an undesirable one.
        first: words that say that the first of two sides is better.
        second: words that say that the second is.
        tie: words that say that neither side is better, or that a label says nothing.

    Raises:
        ValueError: a word is listed for two opposite meanings, or is neither text, number nor boolean.
    """

    desirable: Sequence[object] = ()
    undesirable: Sequence[object] = ()
    first: Sequence[object] = ()
    second: Sequence[object] = ()
    tie: Sequence[object] = ()
    _words: Mapping[str, frozenset[str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        words = {}
        for name in MEANINGS:
            listed = getattr(self, name)
            if isinstance(listed, str) or not isinstance(listed, Sequence):
                raise ValueError(f"data.values.{name}: expected a list of words [up,like], found {listed!r}")
            words[name] = frozenset(word for value in listed for word in _spellings(name, value))
            object.__setattr__(self, name, tuple(listed))  # hashable, whatever kind of list YAML gave
        for one, other in OPPOSITES:
            if both := words[one] & words[other]:
                raise ValueError(
                    f"data.values: expected {min(both)!r} to mean one thing, found it in {one} and {other}"
                )
        everything = frozenset().union(*words.values())
        meant = {name: spellings | (MEANINGS[name] - everything) for name, spellings in words.items()}
        object.__setattr__(self, "_words", meant)

    def listed(self) -> dict[str, list[object]]:
        """Return the user's words for each meaning that has any."""
        return {name: list(words) for name in MEANINGS if (words := getattr(self, name))}

    def label(self, where: str, name: str, value: object) -> bool:
        """Return whether a value means desirable.

        Raises:
            ValueError: the value has neither meaning.
        """
        word = plain_word(value)
        if word in self._words["desirable"]:
            return True
        if word in self._words["undesirable"]:
            return False
        expected = "true/false, 1/0, 1/-1, yes/no, up/down or another word for desirable or undesirable"
        hint = f" (a score? data.columns.score={name})" if _is_number(value) else ""
        if value is None or value == "":
            hint = "; \"data.values.tie=['']\" leaves rows without one out"
        way_out = f"; name other words with data.values.desirable=[…] and data.values.undesirable=[…]{hint}"
        raise _with_hint(wrong(where, name, expected, value), way_out)

    def leaves_out(self, value: object) -> bool:
        """Return whether a value is one of the user's words of ``tie``, of which '' means an empty value."""
        return bool(self.tie) and plain_word("" if value is None else value) in map(plain_word, self.tie)

    def winner(self, where: str, name: str, value: object, sides: tuple[str, str]) -> tuple[int, ...]:
        """Return the better one of two sides.

        Args:
            where: the location of the row.
            name: the column of the value.
            value: the value.
            sides: the columns of the two sides; their own names, and numbers at their ends, are words for them.

        Returns:
            (0,) for the first, (1,) for the second, () for a tie.

        Raises:
            ValueError: the value has none of these meanings.
        """
        word = plain_word(value)
        ends = tuple(side.rpartition(".")[2].casefold() for side in sides)
        numbers = [match.group() if (match := re.search(r"\d+$", end)) else None for end in ends]
        for place, meaning in enumerate(("first", "second")):
            if word in self._words[meaning] or word in (ends[place], numbers[place]):
                return (place,)
        if word in self._words["tie"]:
            return ()
        side_words = " or ".join(number or repr(side) for number, side in zip(numbers, sides, strict=True))
        way_out = "; name other words with data.values.first=[…], data.values.second=[…] and data.values.tie=[…]"
        raise _with_hint(wrong(where, name, f"{side_words}, left/right, a/b or tie", value), way_out)


GRADED = re.compile(r"([+-]?\d+(?:[.,]\d{1,2}|\.\d+)?)\s*(?:/\s*\d+|out of \d+|stars?|points?|%)?", re.IGNORECASE)
"""A score with its scale or unit: ``4/5``, ``4 stars``, ``4,5``."""


def score_in(where: str, name: str, value: object) -> float | None:
    """Return a score, also one that is written as text (``4``, ``4/5``, ``4 stars``, ``★★★★☆``); None if empty.

    Raises:
        ValueError: it is not a number.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        number = graded_number(value)
        if number is None:
            way_out = (
                f"; words are a label: data.columns.label={name} data.values.desirable=[…] data.values.undesirable=[…]"
            )
            raise _with_hint(wrong(where, name, "a number", value), way_out)
        value = number
    return score_of(where, name, value)


def graded_number(text: str) -> float | None:
    """Return the number that a text gives as a score, None if it gives none."""
    number = number_in(text)
    if number is not None or len(text) > 40:
        return number
    if match := GRADED.fullmatch(text.strip()):
        return float(match[1].replace(",", "."))
    stars = SKIN_TONES_AND_VARIANTS.sub("", text.strip())
    return float(stars.count("★") + stars.count("⭐")) if stars and not set(stars) - set("★☆⭐") else None


def is_label(value: object) -> bool:
    """Return whether a value is one of the common words or numbers for desirable or undesirable."""
    if not isinstance(value, str | int | float):
        return False
    word = plain_word(value)
    return word in MEANINGS["desirable"] or word in MEANINGS["undesirable"]


def _is_number(value: object) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or (
        isinstance(value, str) and number_in(value) is not None
    )


def _spellings(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, bool):
        return BOOLEANS[value]
    if not isinstance(value, str | int | float):
        raise ValueError(f"data.values.{name}: expected words or numbers, found {value!r}")
    return (plain_word(value),)


def _with_hint(error: ValueError, hint: str) -> ValueError:
    return ValueError(f"{error}{hint}")
