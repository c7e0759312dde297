"""Votes of several people on one reply: by which rule they become a label and a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from halos.data.layouts.values import Values, number_in
from halos.data.reading.fields import wrong
from halos.data.records.adapted import FILTERED, NOTED

DISAGREE = f"{NOTED}completions whose votes disagree"
UNDECIDED = f"{FILTERED}completions whose votes do not decide (data.votes)"


@dataclass(frozen=True, slots=True)
class VoteRule:
    """How votes become a label: ``data.votes``.

    Attributes:
        rule: ``majority``: what most votes say, with weight 1. ``weights``: the same, with the weight
            |up − down| / (up + down). A number above 0.5 and up to 1: what at least this share of the votes says, with
            weight 1.

    Raises:
        ValueError: it is none of these.
    """

    rule: str | float = "majority"

    def __post_init__(self) -> None:
        if self.rule in ("majority", "weights"):
            return
        if isinstance(self.rule, bool) or not isinstance(self.rule, int | float) or not 0.5 < self.rule <= 1:
            raise ValueError(
                f"data.votes: expected majority, weights, or a share above 0.5 and up to 1, found {self.rule!r}"
            )

    def verdict(self, up: float, down: float) -> tuple[bool, float] | None:
        """Return the label and the weight that votes give, None where they do not decide.

        Args:
            up: the number (or the sum of weights) of the votes for desirable, or for the first of two sides.
            down: that of the others.
        """
        total = up + down
        if up == down or (isinstance(self.rule, float | int) and max(up, down) / total < self.rule):
            return None
        return up > down, abs(up - down) / total if self.rule == "weights" else 1.0


def counted_votes(where: str, name: str, votes: object, values: Values) -> tuple[int, int]:
    """Return how many votes are for desirable and for undesirable.

    Args:
        where: the location of the row.
        name: the column of the votes.
        votes: counts by word (``{up: 7, down: 2}``), a list with a word for each vote, or the reactions of a chat
            (``[{name: thumbsup, count: 2}]``).
        values: what the words mean.

    Raises:
        ValueError: it is neither, or a word has no meaning.
    """
    counts = {True: 0, False: 0}
    for word, count in _by_word(where, name, votes):
        counts[values.label(where, name, word)] += count
    return counts[True], counts[False]


def _by_word(where: str, name: str, votes: object) -> Iterable[tuple[object, int]]:
    if isinstance(votes, list):
        return [_reaction(where, f"{name}[{n}]", word) for n, word in enumerate(votes)]
    if not isinstance(votes, Mapping):
        raise wrong(where, name, "counts of votes, such as {up: 7, down: 2}, or a list of votes", votes)
    return [(word, vote_count(where, f"{name}.{word}", count)) for word, count in votes.items()]


def _reaction(where: str, name: str, vote: object) -> tuple[object, int]:
    if not isinstance(vote, Mapping):
        return vote, 1
    word = vote.get("emoji", vote.get("name"))
    word = word.get("name") if isinstance(word, Mapping) else word
    return word, vote_count(where, f"{name}.count", vote.get("count", 1))


def vote_count(where: str, name: str, value: object) -> int:
    """Return a number of votes, also one that is written as text; 0 for an empty cell.

    Raises:
        ValueError: it is not a whole number, or below 0.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return 0
    number = number_in(value) if isinstance(value, str) else value
    if isinstance(value, str) and value.strip().casefold() in ("true", "false"):
        number = value.strip().casefold() == "true"
    if not isinstance(number, int | float) or number != number or number < 0 or number % 1:
        raise wrong(where, name, "a number of votes", value)
    return int(number)
