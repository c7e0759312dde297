"""Packs: where each token, key and score lies."""

from typing import Any

import pytest
import torch

from halos.data.batches import packing, prefix_tree
from halos.data.batches.packing import Pack, map_tensors, pack
from halos.data.rows.token_rows import Row
from tests import tiny

A = Row("a", 0, (5, 6, 7), ((8, 9), (10, 11, 12)))
B = Row("b", 1, (13, 14), ((15, 16, 17), (18,)))
AGAIN = Row("c", 0, (5, 6, 7), ((10, 11, 12), (8, 9, 4)))
WIDTH = 8


def seen(part: Pack) -> list[set[int]]:
    """For each of the pack's own tokens the keys that it may see, from the description of the tokens alone."""
    keys = list(zip(part.node.tolist(), part.last.tolist(), part.position.tolist(), strict=True))
    own = keys[len(keys) - len(part.input_ids) :]
    return [
        {i for i, (first, last, p) in enumerate(keys) if first <= node <= last and p <= position}
        for node, _, position in own
    ]


def queries(part: Pack) -> list[tuple[range, set[int]]]:
    """Each piece's own tokens, and the keys of the pieces that they attend to."""
    starts = [sum(part.sizes[:n]) for n in range(len(part.sizes) + 1)]
    pieces = [set(range(starts[n], starts[n + 1])) for n in range(len(part.sizes))]
    before = len(part.sizes) - len(part.attends)
    shift = starts[before]
    return [
        (range(starts[before + n] - shift, starts[before + n + 1] - shift), set().union(*(pieces[i] for i in reads)))
        for n, reads in enumerate(part.attends)
    ]


# One pack


def test_packing_by_hand() -> None:
    (part,) = pack([A, B], width=WIDTH)
    # The last token of a branch predicts nothing and is not fed; branches of one token feed none.
    assert part.input_ids.tolist() == [5, 6, 7, 8, 10, 11, 13, 14, 15, 16]
    assert part.position.tolist() == [0, 1, 2, 3, 3, 4, 0, 1, 2, 3]
    assert part.node.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 4, 4]
    assert part.last.tolist() == [2, 2, 2, 1, 2, 2, 4, 4, 4, 4]
    assert part.occurrences.tolist() == [2, 2, 2, 1, 1, 1, 2, 2, 1, 1]
    assert part.kept.tolist() == []
    # Every branch's first token is predicted from the last place of its prompt.
    assert part.predicts.tolist() == [2, 3, 2, 4, 5, 7, 8, 9, 7]
    assert part.targets.tolist() == [8, 9, 10, 11, 12, 15, 16, 17, 18]
    assert part.slots.tolist() == [0, 1, 8, 9, 10, 16, 17, 18, 24]
    assert part.sources.tolist() == list(range(9))
    assert part.needs_grad
    assert not part.continues


def test_examples_of_one_prompt_share_it_and_what_they_have_in_common() -> None:
    (part,) = pack([A, AGAIN], width=WIDTH)
    assert part.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert part.targets.tolist() == [8, 9, 10, 11, 12, 4]
    assert part.slots.tolist() == [0, 1, 8, 9, 10, 16, 17, 18, 24, 25, 26]
    assert part.sources.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 0, 1, 5]
    assert part.occurrences.tolist() == [4, 4, 4, 2, 1, 2, 2]


def test_a_later_prompt_of_a_conversation_continues_an_earlier_one() -> None:
    # The tree of the file's docstring: a b c are 1 2 3, p q r are 4 5 6, s t are 7 8, u is 9 and v is 10.
    rows = [Row("x", 0, (1, 2, 3), ((4, 5, 6), (7, 8))), Row("y", 1, (1, 2, 3, 7, 8, 9), ((10,), (10, 11)))]
    (part,) = pack(rows, width=3)
    assert part.input_ids.tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert part.position.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6]
    assert part.predicts.tolist() == [2, 3, 4, 2, 5, 7, 8]
    assert part.targets.tolist() == [4, 5, 6, 7, 8, 10, 11]
    assert part.sources.tolist() == [0, 1, 2, 3, 4, 5, 5, 6]
    assert part.occurrences.tolist() == [4, 4, 4, 1, 1, 3, 2, 2, 1]
    assert seen(part)[7] == {0, 1, 2, 5, 6, 7}
    assert seen(part)[4] == {0, 1, 2, 3, 4}


def test_without_sharing_every_branch_has_its_prompt() -> None:
    (part,) = pack([A, AGAIN], width=WIDTH, share_prompts=False)
    assert part.input_ids.tolist() == [5, 6, 7, 8, 5, 6, 7, 10, 11, 5, 6, 7, 10, 11, 5, 6, 7, 8, 9]
    assert part.sources.tolist() == list(range(11))
    assert set(part.occurrences.tolist()) == {1}


# The mismatched completions


def test_mismatched_completions_continue_the_prompts_of_the_first_pack() -> None:
    first, second = pack([A, B], width=WIDTH, mismatched=True)
    assert first.input_ids.tolist() == [5, 6, 7, 8, 13, 14, 15, 16]
    assert first.targets.tolist() == [8, 9, 15, 16, 17]
    assert not second.needs_grad
    assert second.continues
    assert second.input_ids.tolist() == [10, 11]
    # Keys: the prompt of A, whose y' has tokens to feed, then the tokens of this pack.
    assert first.kept.tolist() == [0, 1, 2]
    assert second.node.tolist() == [0, 0, 0, 2, 2]
    assert second.last.tolist() == [2, 2, 2, 2, 2]
    assert second.position.tolist() == [0, 1, 2, 3, 4]
    # States: the first pack's eight, then this one's two.
    assert second.predicts.tolist() == [2, 8, 9, 5]
    assert second.targets.tolist() == [10, 11, 12, 18]
    # Log-probs: the first pack's five, then this one's four.
    assert second.sources.tolist() == [5, 6, 7, 8]
    assert second.slots.tolist() == [8, 9, 10, 24]


def test_a_mismatched_completion_that_is_scored_already_is_not_scored_again() -> None:
    first, second = pack([A, AGAIN, B], width=WIDTH, mismatched=True)
    # Of AGAIN's y' 8 9 4, 8 and 9 are scored in A's 8 9; A's y' is what AGAIN is trained on, B's has one token.
    assert second.input_ids.tolist() == [9]
    assert first.input_ids[first.kept].tolist() == [5, 6, 7, 8]
    assert second.targets.tolist() == [4, 18]
    a = first.targets.tolist().index(10)
    assert second.sources.tolist() == [a, a + 1, a + 2, 0, 1, 8, 9]


def test_a_second_pack_is_never_empty() -> None:
    # All ranks run equally many forwards.
    rows = [Row("a", 0, (5, 6), ((7, 8), (9,))), Row("b", 1, (6,), ((7,), (7,)))]
    _, second = pack(rows, width=2, mismatched=True)
    assert len(second.input_ids) == 1
    assert second.targets.tolist() == [9]
    assert seen(second)[0] == {0}


def test_without_sharing_mismatched_completions_have_prompts_of_their_own() -> None:
    first, second = pack([A, B], width=WIDTH, mismatched=True, share_prompts=False)
    assert not second.continues
    assert second.input_ids.tolist() == [5, 6, 7, 10, 11, 13, 14]
    assert second.predicts.tolist() == [len(first.input_ids) + n for n in (2, 3, 4, 6)]
    assert second.sources.tolist() == [5, 6, 7, 8]


# Whatever the rows


LIMITS = [(0, 10_000), (12, 10_000), (10_000, 10_000), (0, 8), (12, 12)]


@pytest.fixture(params=LIMITS, ids=str)
def limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    grouped, dense = request.param
    monkeypatch.setattr(prefix_tree, "SHARED_MIN_TOKENS", 3)
    monkeypatch.setattr(packing, "GROUPED_TREES_MAX_TOKENS", grouped)
    monkeypatch.setattr(packing, "DENSE_TREE_MAX_TOKENS", dense)
    return request.param


def ragged(seed: int) -> list[Row]:
    rows = tiny.rows(7, branches=3, seed=seed)
    again = Row("again", 0, rows[2].prompt, (rows[2].branches[1], (3,), rows[2].branches[0]))
    return [*rows, again, *tiny.conversation(branches=3, seed=seed)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("mismatched", [True, False])
@pytest.mark.usefixtures("limits")
def test_every_token_is_scored_once_behind_the_tokens_before_it(seed: int, share: bool, mismatched: bool) -> None:
    rows = ragged(seed)
    packs = pack(rows, width=WIDTH, mismatched=mismatched, share_prompts=share)
    assert len(packs) == 1 + mismatched
    fed: list[int] = []
    context: list[list[int]] = []
    targets: list[int] = []
    predicts: list[int] = []
    grid: dict[int, int] = {}
    kept: list[int] = []
    for part in packs:
        keys = (kept if part.continues else []) + part.input_ids.tolist()
        order = part.position.tolist()
        context += [[keys[i] for i in sorted(visible, key=order.__getitem__)] for visible in seen(part)]
        fed += part.input_ids.tolist()
        targets += part.targets.tolist()
        predicts += part.predicts.tolist()
        kept = part.input_ids[part.kept].tolist()
        for source, slot in zip(part.sources.tolist(), part.slots.tolist(), strict=True):
            assert slot not in grid
            grid[slot] = source
    expected = {
        (b * 3 + k) * WIDTH + t: (list(row.prompt + branch[:t]), branch[t])
        for b, row in enumerate(rows)
        for k, branch in enumerate(row.branches)
        for t in range(len(branch))
    }
    assert {slot: (context[predicts[n]], targets[n]) for slot, n in grid.items()} == expected


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.usefixtures("limits")
def test_pieces_cover_all_that_a_token_may_see(share: bool) -> None:
    for part in pack(ragged(1), width=WIDTH, mismatched=True, share_prompts=share):
        visible = seen(part)
        covered: list[int] = []
        for own, keys in queries(part):
            covered += own
            assert all(visible[i] <= keys for i in own)
        assert covered == list(range(len(part.input_ids)))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.usefixtures("limits")
def test_plain_pieces_are_causal(share: bool) -> None:
    plain = 0
    for part in pack(ragged(2), width=WIDTH, mismatched=True, share_prompts=share):
        before = len(part.sizes) - len(part.attends)
        visible = seen(part)
        for number, (own, keys) in enumerate(queries(part), before):
            shift = sum(part.sizes[:before])
            causal = all(visible[i] == set(range(own[0] + shift, i + shift + 1)) for i in own)
            assert causal and len(keys) == len(own) if number in part.plain else True
            plain += number in part.plain
    assert plain or share or packing.GROUPED_TREES_MAX_TOKENS


def test_short_trees_share_a_call_and_long_ones_are_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(str(n), n, tuple(range(10 * n, 11 * n + 1)), ((1, 2, 3), (4, 5, 6))) for n in range(6)]
    monkeypatch.setattr(packing, "GROUPED_TREES_MAX_TOKENS", 14)
    (part,) = pack(rows, width=WIDTH)
    assert part.sizes == (5 + 6, 7, 8, 9, 10)
    monkeypatch.setattr(packing, "DENSE_TREE_MAX_TOKENS", 9)
    (part,) = pack(rows, width=WIDTH)
    assert part.sizes == (11, 7, 8, 9, 6, 4)
    assert part.attends[-2:] == ((4,), (4, 5))
    monkeypatch.setattr(packing, "DENSE_TREE_MAX_TOKENS", 100)
    monkeypatch.setattr(packing, "GROUPED_TREES_MAX_TOKENS", 0)
    # A prompt of 6 tokens, branches of 2 and 2: 6 x 4 pairs of the prompt with what follows, 2 x 2 x 2 of branches.
    for limit, sizes in ((7, (6, 2, 2)), (8, (6, 4)), (31, (6, 4)), (32, (10,))):
        monkeypatch.setattr(packing, "DENSE_TREE_MAX_MASKED_PAIRS", limit)
        (part,) = pack(rows[-1:], width=WIDTH)
        assert part.sizes == sizes


def test_further_branches_of_a_prompt_are_taken_apart_by_what_they_do_not_see_of_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [Row(str(n), 0, tuple(range(50)), ((1, 2), (3 + n, 4, 5))) for n in range(2)]
    monkeypatch.setattr(packing, "GROUPED_TREES_MAX_TOKENS", 0)
    for limit, sizes in ((7, (50, 2, 2)), (8, (50, 4))):  # 2 x 2 x 2 pairs; they see the whole prompt
        monkeypatch.setattr(packing, "DENSE_TREE_MAX_MASKED_PAIRS", limit)
        _, second = pack(rows, width=WIDTH, mismatched=True)
        assert second.sizes == sizes


def test_a_copy_on_a_device_has_all_tensors_there() -> None:
    (part,) = pack([A, B], width=WIDTH)
    moved = map_tensors(part, lambda tensor: tensor.to("meta"))
    tensors = [getattr(moved, name) for name in Pack.__slots__ if isinstance(getattr(moved, name), torch.Tensor)]
    assert len(tensors) == 10
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.sizes, moved.attends) == (part.sizes, part.attends)
