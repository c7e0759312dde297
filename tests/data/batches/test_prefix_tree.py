"""Prefix trees: what sequences share, and how nodes are numbered and measured."""

import random

import pytest

from halos.data.batches import prefix_tree
from halos.data.batches.prefix_tree import Node, PrefixTree, trained_above


def sequence(node: Node) -> tuple[int, ...]:
    return tuple(token for one in node.path() for token in one.ids)


def random_sequences(seed: int, count: int = 12) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt, completion) of few different tokens, so that many begin alike."""
    rng = random.Random(seed)

    def ids(least: int) -> tuple[int, ...]:
        return tuple(rng.choices((1, 2), k=rng.randint(least, 6)))

    return [(ids(1), ids(0)) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_with_any_beginning_shared_every_beginning_is_there_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "SHARED_MIN_TOKENS", 1)
    tree, sequences = PrefixTree(), random_sequences(seed)
    ends = [tree.add(*one, trained=n < 8) for n, one in enumerate(sequences)]
    assert [sequence(node) for node in ends] == [prompt + completion for prompt, completion in sequences]
    beginnings = {(p + c)[:n] for p, c in sequences for n in range(1, len(p + c) + 1)}
    nodes = tree.nodes()
    assert sum(len(node.ids) for node in nodes) == tree.tokens == len(beginnings)
    assert {sequence(node) for node in nodes} <= beginnings
    for node in nodes:
        before = [] if node.parent is None else node.parent.path()
        assert node.position == sum(len(one.ids) for one in before)
    trained = {(p + c)[:n] for p, c in sequences[:8] for n in range(1, len(p + c) + 1)}
    assert sum(len(node.ids) for node in nodes if node.trained) == len(trained)


@pytest.mark.parametrize("seed", range(5))
def test_a_node_is_below_another_if_its_number_is_in_its_range(seed: int) -> None:
    tree = PrefixTree()
    for prompt, completion in random_sequences(seed):
        tree.add(prompt, completion)
    nodes = tree.nodes()
    assert [node.number for node in nodes] == list(range(len(nodes)))
    for above in nodes:
        for node in nodes:
            assert (above.number <= node.number <= above.last) == (above in node.path())


@pytest.mark.parametrize("seed", range(5))
def test_unseen_pairs_are_those_that_one_mask_would_throw_away(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "SHARED_MIN_TOKENS", 2)
    tree = PrefixTree()
    for prompt, completion in random_sequences(seed):
        tree.add(prompt, completion)
    for top in tree.nodes():
        below = [node for node in tree.nodes() if top.number <= node.number <= top.last]
        assert top.size == sum(len(node.ids) for node in below)
        by_hand = sum(
            len(query.ids) * len(key.ids)
            for query in below
            for key in below
            if key not in query.path() and not (query in key.path() and is_causal(query))
        )
        assert top.unseen == by_hand


def is_causal(node: Node) -> bool:
    """Whether no branching is below."""
    return not node.children or (len(node.children) == 1 and is_causal(node.children[0]))


def test_a_few_tokens_alone_are_not_shared() -> None:
    few, many = (tuple(range(1, n + 1)) for n in (31, 32))
    for shared, tokens in ((few, 2 * 31 + 3 + 4), (many, 32 + 3 + 4)):
        tree = PrefixTree()
        tree.add((*shared, 50, 51, 52), ())
        tree.add((*shared, 60, 61, 62, 63), ())
        assert tree.tokens == tokens


def test_the_end_of_a_prompt_is_shared_however_short_it_is() -> None:
    tree = PrefixTree()
    tree.add((1, 2, 3, 4), (5, 6))
    tree.add((1, 2), (7, 8))
    tree.add((1, 2), (7, 9))
    assert tree.tokens == 4 + 2 + 2 + 2


def test_without_sharing_each_sequence_is_by_itself() -> None:
    tree = PrefixTree(share=False)
    for _ in range(2):
        tree.add((1, 2), (3,))
    assert tree.tokens == 6
    assert len(tree.root.children) == 2


def test_the_nodes_above_those_that_are_not_trained() -> None:
    tree = PrefixTree()
    tree.add((1, 2), (3, 4))
    tree.add((5, 6), (7,))
    tree.add((1, 2), (8,), trained=False)
    tree.add((5, 6), (7,), trained=False)
    assert [node.ids for node in trained_above(tree.nodes())] == [(1, 2)]


def test_a_conversation_may_be_deeper_than_the_stack() -> None:
    tree = PrefixTree()
    prompt: tuple[int, ...] = (1,)
    for turn in range(1100):  # Python's stack has 1,000 places
        tree.add(prompt, (2, turn))
        prompt = (*prompt, 3)
    assert tree.nodes()[0].last == 2 * 1100 - 1
