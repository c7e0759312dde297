"""Which completions the reference pass computes together."""

import random

import pytest

from halos.data.batches.packing import pack
from halos.data.batches.reference_table import completions
from halos.data.rows.token_rows import Row
from halos.policy.reference.forwards import Work, forwards


def items(*, prompts: int, prompt: int, replies: int, reply: int, seed: int = 0) -> Work:
    """Replies to prompts of random tokens, sorted as the reference pass sorts them."""
    draw = random.Random(seed)

    def ids(size: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(10_000), k=size))

    rows = [Row("", n, ids(prompt), tuple(ids(reply) for _ in range(replies))) for n in range(prompts)]
    return sorted(completions(rows).items(), key=lambda item: (item[1].prompt, item[1].branches))


def packed_tokens(work: Work) -> int:
    rows = [row for _, row in work]
    return sum(len(part.input_ids) for part in pack(rows, width=max(len(row.branches[0]) for row in rows)))


@pytest.mark.parametrize("share_prompts", [True, False])
def test_every_completion_is_in_one_forward_in_order(share_prompts: bool) -> None:
    listed = items(prompts=9, prompt=40, replies=3, reply=10)
    for limit in (1, 60, 200, 100_000):
        works = list(forwards(listed, limit, share_prompts=share_prompts))
        assert [item for work in works for item in work] == listed
        assert all(works)
        assert all(len(work) == 1 or packed_tokens(work) <= limit for work in works)
    assert len(works) == 1


def test_a_prompt_that_fits_is_computed_once() -> None:
    # A prompt with its four replies has 70 + 4 × 10 tokens, of which the last one of each reply is not fed. Two fit
    # into a forward of 310 tokens, and one reply of a third.
    listed = items(prompts=8, prompt=70, replies=4, reply=10)
    works = list(forwards(listed, 310, share_prompts=True))
    assert [len(work) for work in works] == [8, 8, 8, 8]
    assert sum(map(packed_tokens, works)) == 8 * (70 + 4 * 9)


def test_a_prompt_that_does_not_fit_is_repeated_in_each_forward() -> None:
    listed = items(prompts=1, prompt=70, replies=4, reply=10)
    works = list(forwards(listed, 100, share_prompts=True))
    assert [len(work) for work in works] == [3, 1]
    assert sum(map(packed_tokens, works)) == 2 * 70 + 4 * 9


def test_none_makes_none() -> None:
    assert not list(forwards([], 100, share_prompts=True))
