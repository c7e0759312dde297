"""The counts of tokens that the benchmark compares with."""

import itertools
import random

from benchmarks.shared_tokens import fed_sequences, least_tokens
from halos.data.rows.token_rows import Row


def test_the_least_is_the_number_of_different_beginnings() -> None:
    draw = random.Random(0)
    for _ in range(50):
        sequences = {tuple(draw.choices(range(3), k=draw.randint(1, 6))) for _ in range(12)}
        beginnings = {sequence[:end] for sequence in sequences for end in range(1, len(sequence) + 1)}
        assert least_tokens(sequences) == len(beginnings)


def test_the_last_scored_token_is_not_fed() -> None:
    row = Row("a", 0, (1, 2), ((3, 4, 5, 6), (5,)), context=(((1, 3),), ()))
    unscored_end = Row("b", 0, (1, 2), ((3, 4, 5, 6),), context=(((2, 4),),))
    assert fed_sequences([row]) == {(1, 2, 3, 4, 5), (1, 2)}
    assert fed_sequences([unscored_end]) == {(1, 2, 3)}


def test_nothing_needs_nothing() -> None:
    assert least_tokens(set()) == 0
    assert least_tokens(set(itertools.permutations(range(3)))) == 3 + 6 + 6
